// attend on Hopper (sm_90a) where tokens see at most 128 rows, as in layers without entries: a thread block a token and
// 64 heads, four warpgroups in step.
//
// As in sm90.cuh, with k8 a row's codes, s its scale and r its RoPE half,
//   score = s (q_nope . k8) + q_rope . r,   out_nope = sum (p s) k8,   out_rope = sum p r,
// and codes become float16, exactly, in registers. All rows come at once. Two warpgroups share the scores of 64 rows,
// one over values 0 to 255, the other over the rest, and pass each other the sums of half of the heads; then each of
// the four holds 128 values of the output of all heads. All multiply at the same time: one's conversions hide behind
// the products of the others. There are no barriers but those of the thread block.
#ifndef DSV4_ATTEND_WINDOW_CUH_
#define DSV4_ATTEND_WINDOW_CUH_

#include <type_traits>

#include "attend/op.h"
#include "cuda/group_scales.cuh"
#include "cuda/ptx.cuh"

namespace dsv4::attend_window {

constexpr int kNope = 448, kRope = 64, kWidth = kNope + kRope, kChunks = kNope / 64;
constexpr int kHeads = 64;  // of a thread block
constexpr int kHalf = 64;   // rows of two warpgroups
constexpr int kRows = 2 * kHalf;
constexpr int kPitch = 608;  // bytes of a row in shared memory: 448 + 128 and 32, which also keep its banks apart
constexpr int kOutPitch = 2 * kWidth + 16;  // of a head's output
constexpr int kWarpgroup = 128, kThreads = 4 * kWarpgroup, kWarps = kThreads / 32;
constexpr float kLog2e = 1.4426950408889634f;

// What lies behind a row in shared memory.
struct Behind {
  uint64_t stored;           // its scales as they are stored: one float, or one of E8M0 for every 64 values
  float largest;             // of several scales
  uint16_t factor[kChunks];  // float16: scale of 64 values by the largest
  uint8_t visible;
};
static_assert(kWidth + kRope + sizeof(Behind) <= kPitch, "the row is longer");

struct SharedMemory {
  union {
    uint8_t q[9][kHeads * 128];  // 64 values of every head, swizzled; the last two: RoPE, bfloat16, and what that lacks
    uint8_t out[kHeads * kOutPitch];  // bfloat16
  };
  union {
    struct {
      uint8_t p[kRows * 128];       // probability times scale, float16, a row of 64 heads, swizzled
      uint8_t p_rope[kRows * 128];  // probability, bfloat16
    };
    float4 passed[2][2][4][kWarpgroup];  // scores of half of the rows and half of the heads
  };
  uint8_t rows[kRows * kPitch];
  union {
    float sum[8][kHeads];      // of the probabilities, of each sixteen rows
    float squares[kWarps][8];  // of raw queries
  };
  alignas(16) int most[kHeads];  // reference of the softmax: the largest score times scale, in order as integers
  float inverse[kHeads];         // of the sum with the sink

  __device__ __forceinline__ Behind& behind(int row) {
    return *reinterpret_cast<Behind*>(rows + row * kPitch + kNope + 2 * kRope);
  }
  __device__ __forceinline__ const Behind& behind(int row) const {
    return *reinterpret_cast<const Behind*>(rows + row * kPitch + kNope + 2 * kRope);
  }
};
constexpr int kSharedBytes = sizeof(SharedMemory);
static_assert(kSharedBytes <= 232448, "more than a multiprocessor has");

// Rows of a thread block of 64 heads in the fragments of a product: row g of 16 lies at g with the middle bits turned,
// so that eight lanes that load together meet no bank twice.
__device__ __forceinline__ int turned(int g) { return (g & 4) | ((g >> 1) & 1) | ((g & 1) << 1); }
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

// Floats as integers of the same order, and back.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF)); }

// Fetches the token's rows, eight lanes a row, two rows a thread: the window's position `back` steps before the
// token's. What is not visible is filled with zeros: its probability is 0, and 0 times what lies there must be 0.
template <bool kGroups>
__device__ __forceinline__ void fetch_rows(const AttendCall& call, SharedMemory& shared, int32_t slot, int32_t position,
                                           int64_t t) {
  int32_t first_fresh = 0x7FFFFFFF;  // position of the step's first token; beyond every position without fresh rows
  const int32_t* fresh_rows = nullptr;
  if (call.has_fresh) {
    const uint32_t segment = static_cast<uint32_t>(call.segment_rows[t]) / static_cast<uint32_t>(call.per_segment);
    if (segment < call.num_segments) {
      first_fresh = call.starts[segment], fresh_rows = call.segment_tokens + segment * call.per_segment;
    }
  }
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = kHalf * half + threadIdx.x / 8;
    const int back = static_cast<int>(call.window) - 1 - row, at = position - back;
    const ReadRecords* records = &call.ring;
    uint32_t index = 0;
    bool found = back >= 0 && at >= 0;
    if (found && at >= first_fresh) {
      records = &call.fresh, index = static_cast<uint32_t>(fresh_rows[at - first_fresh]);
      found = index < call.tokens;
      if (!found) index = 0;
    } else if (found) {
      index = slot * static_cast<uint32_t>(call.ring_rows) + modulo(at, static_cast<uint32_t>(call.ring_rows));
    }
    const uint32_t to = ptx::shared_address(shared.rows + row * kPitch) + 16 * piece;
    const uint64_t codes = reinterpret_cast<uint64_t>(records->nope) + uint64_t{index} * kNope + 16 * piece;
    const uint64_t rope = reinterpret_cast<uint64_t>(records->rope) + uint64_t{index} * (2 * kRope) + 16 * piece;
#pragma unroll
    for (int k = 0; k < 3; ++k) ptx::copy_16(to + 128 * k, codes + 128 * k, found);
    if (piece < 4) ptx::copy_16(to + 128 * 3, codes + 128 * 3, found);
    ptx::copy_16(to + kNope, rope, found);
    if (piece == 0) {
      constexpr int kBytes = kGroups ? 8 : 4;
      const uint64_t scale = reinterpret_cast<uint64_t>(records->scale) + uint64_t{index} * kBytes;
      ptx::copy_small<kBytes>(ptx::shared_address(&shared.behind(row).stored), scale, found);
      shared.behind(row).visible = found;
    }
  }
}

// This thread's part of the queries, from `from` (heads, 512): a pair of warps takes eight heads, each of them half of
// the values; four lanes share a head, and have of every 32 values eight.
template <typename T>
struct Queries {
  static constexpr int kWords = sizeof(T) / 2;  // of 16 bytes, for eight values
  uint4 stored[8][kWords];

  __device__ __forceinline__ void load(const T* from, int heads) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = 8 * (warp / 2) + lane / 4;
    const uint4* at = reinterpret_cast<const uint4*>(from + head * kWidth + 256 * (warp % 2) + 8 * (lane % 4));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int part = 0; part < kWords; ++part) {
        stored[i][part] = head < heads ? __ldg(at + 4 * kWords * i + part) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ __forceinline__ float value(int i, int v) const {
    const uint4& four = stored[i][v / (8 / kWords)];
    const int word = kWords == 2 ? v % 4 : v / 2;
    const uint32_t x = word == 0 ? four.x : word == 1 ? four.y : word == 2 ? four.z : four.w;
    if constexpr (kWords == 2) return __uint_as_float(x);
    return __uint_as_float(v % 2 ? x & 0xFFFF0000u : x << 16);
  }

  // Normed and rotated where they come raw, as float16; the RoPE half as two terms in bfloat16. In the order in which
  // the fragments of rows have values.
  __device__ __forceinline__ void store(const AttendCall& call, SharedMemory& shared, int64_t t) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, head = 8 * (warp / 2) + lane / 4, quarter = lane % 4;
    float norm = 1.0f;
    if (call.cos) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int v = 0; v < 8; ++v) squares = fmaf(value(i, v), value(i, v), squares);
      }
      squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 1);
      squares += __shfl_xor_sync(0xFFFFFFFFu, squares, 2);
      if (quarter == 0) shared.squares[warp][lane / 4] = squares;
      __syncthreads();
      squares = shared.squares[warp & ~1][lane / 4] + shared.squares[warp | 1][lane / 4];
      norm = rsqrtf(squares / kWidth + call.eps);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int chunk = 4 * (warp % 2) + i / 2;
      float x[8];
#pragma unroll
      for (int v = 0; v < 8; ++v) x[v] = value(i, v) * norm;
      const bool rope = i >= 6 && chunk == kChunks;
      if (rope && call.cos) {
        const int64_t at = t * (kRope / 2) + 16 * (i % 2) + 4 * quarter;
        const float4 c = __ldg(reinterpret_cast<const float4*>(call.cos + at));
        const float4 s = __ldg(reinterpret_cast<const float4*>(call.sin + at));
        const float cos[4] = {c.x, c.y, c.z, c.w}, sin[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const float a = x[2 * pair], b = x[2 * pair + 1];
          x[2 * pair] = a * cos[pair] - b * sin[pair], x[2 * pair + 1] = a * sin[pair] + b * cos[pair];
        }
      }
      uint8_t* tile = shared.q[chunk] + 4 * quarter;
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const uint32_t at = swizzled(head, 4 * (i % 2) + pair);
        const float a = x[2 * pair], b = x[2 * pair + 1];
        if (!rope) {
          *reinterpret_cast<uint32_t*>(tile + at) = ptx::half_pair(a, b);
        } else {
          const uint32_t high = ptx::bfloat_pair(a, b);
          *reinterpret_cast<uint32_t*>(tile + at) = high;
          *reinterpret_cast<uint32_t*>(tile + kHeads * 128 + at) =
              ptx::bfloat_pair(a - __uint_as_float(high << 16), b - __uint_as_float(high & 0xFFFF0000u));
        }
      }
    }
  }
};

// The largest of a row's scales and, relative to it, that of every 64 values.
__device__ __forceinline__ void unpack_scales(Behind& row) {
  row.largest = dsv4::unpack_scales<kChunks>(row.stored, [&](int i, uint16_t factor) { row.factor[i] = factor; });
}

// What a row's codes are multiplied by, after unpack_scales where there are several scales.
template <bool kGroups>
__device__ __forceinline__ float scale_of(const Behind& row) {
  const float scale = kGroups ? row.largest : __uint_as_float(static_cast<uint32_t>(row.stored));
  return scale < 1e-30f ? 1e-30f : scale;  // one of 0 belongs to codes of 0; NaN stays
}

// Reduces 8 values over the eight lanes that have the same `quarter`: lane g of them ends with value g, in x[0].
// (A template, as the compiler leaves a loop over halves rolled and x in local memory.)
template <int kLeft = 4, typename Combine>
__device__ __forceinline__ void reduce_spread(float (&x)[8], int lane, Combine combine) {
  const bool upper = lane & (4 * kLeft);
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? x[i] : x[i + kLeft], 4 * kLeft);
    x[i] = combine(upper ? x[i + kLeft] : x[i], other);
  }
  if constexpr (kLeft > 1) reduce_spread<kLeft / 2>(x, lane, combine);
}

// Of which threads: a warp of a warpgroup, and lanes as the fragments of products count them.
struct Lane {
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  const int half = group & 1, part = group >> 1;  // the rows and the values that the warpgroup has of the scores
  // The head that a lane is left with after reduce_spread.
  __device__ __forceinline__ int head() const { return 32 * part + 8 * (g / 2) + 2 * quarter + (g & 1); }
  // The thread's rows are this and the one eight below.
  __device__ __forceinline__ int low() const { return kHalf * half + 16 * warp + turned(g); }
};

// Products of 64 rows with the queries, over values 0 to 255 or, where `part` is 1, the others: sums[4 j] and the next
// are of row `low` and heads 8 j + 2 quarter and the next, the two after them of the row eight below. To be multiplied
// by the scales.
template <bool kGroups>
__device__ __forceinline__ void multiply_values(const SharedMemory& shared, const Lane& own, bool two_parts,
                                                float (&sums)[32]) {
  const int low = own.low();
  const uint8_t* rows = shared.rows + low * kPitch;
#pragma unroll
  for (int i = 0; i < 32; ++i) sums[i] = 0.0f;
  if (own.part) {  // the RoPE half first, divided by what all is multiplied by in the end
    uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[kChunks]));
    const uint8_t* from = rows + kNope + 16 * own.quarter;
    uint32_t a[4][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 l = *reinterpret_cast<const uint4*>(from + 64 * half);
      const uint4 h = *reinterpret_cast<const uint4*>(from + 64 * half + 8 * kPitch);
      a[2 * half][0] = l.x, a[2 * half][1] = h.x, a[2 * half][2] = l.y, a[2 * half][3] = h.y;
      a[2 * half + 1][0] = l.z, a[2 * half + 1][1] = h.z, a[2 * half + 1][2] = l.w, a[2 * half + 1][3] = h.w;
    }
    ptx::products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) ptx::product_bf16<0>(sums, a[step], b + 2 * step);
    if (two_parts) {
      b += kHeads * 128 >> 4;
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::product_bf16<0>(sums, a[step], b + 2 * step);
    }
    ptx::products_commit();
    const float inverse_low = __fdividef(1.0f, scale_of<kGroups>(shared.behind(low)));
    const float inverse_high = __fdividef(1.0f, scale_of<kGroups>(shared.behind(low + 8)));
    ptx::products_wait<0>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      sums[4 * j] *= inverse_low, sums[4 * j + 1] *= inverse_low;
      sums[4 * j + 2] *= inverse_high, sums[4 * j + 3] *= inverse_high;
    }
  }
  const uint8_t* codes = rows + 256 * own.part + 8 * own.quarter;
  uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[4 * own.part]));
  const int chunks = own.part ? kChunks - 4 : 4;
  uint2 l[2], h[2];  // of the 64 values to come
  const auto load = [&](int chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      l[half] = *reinterpret_cast<const uint2*>(codes + 64 * chunk + 32 * half);
      h[half] = *reinterpret_cast<const uint2*>(codes + 64 * chunk + 32 * half + 8 * kPitch);
    }
  };
  load(0);
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t a[4][4];
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t x = step % 2 ? l[step / 2].y : l[step / 2].x, y = step % 2 ? h[step / 2].y : h[step / 2].x;
      ptx::halves_of_e4m3(x, &a[step][0], &a[step][2]);
      ptx::halves_of_e4m3(y, &a[step][1], &a[step][3]);
    }
    if constexpr (kGroups) {
      const uint32_t fl = shared.behind(low).factor[4 * own.part + chunk] * 0x10001u;
      const uint32_t fh = shared.behind(low + 8).factor[4 * own.part + chunk] * 0x10001u;
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        a[step][0] = ptx::multiply_halves(a[step][0], fl), a[step][2] = ptx::multiply_halves(a[step][2], fl);
        a[step][1] = ptx::multiply_halves(a[step][1], fh), a[step][3] = ptx::multiply_halves(a[step][3], fh);
      }
    }
    ptx::products_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) ptx::product_f16<0>(sums, a[step], b + 2 * step);
    ptx::products_commit();
    if (chunk + 1 < chunks) load(chunk + 1);  // they come while the products run
    b += kHeads * 128 >> 4;
    ptx::products_wait<0>();
  }
}

// Scores of this warpgroup's rows and half of the heads. Two warpgroups each multiply half of the values, and pass on
// what the other has the heads of.
template <bool kGroups>
__device__ __forceinline__ void score_rows(SharedMemory& shared, const Lane& own, bool two_parts, float factor,
                                           float (&scores)[16]) {
  float sums[32];
  multiply_values<kGroups>(shared, own, two_parts, sums);
  const float by_low = factor * scale_of<kGroups>(shared.behind(own.low()));
  const float by_high = factor * scale_of<kGroups>(shared.behind(own.low() + 8));
  const int thread = threadIdx.x % kWarpgroup;
  float4* pass = &shared.passed[own.half][own.part ^ 1][0][thread];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float* x = sums + 4 * j;
    pass[j * kWarpgroup] = make_float4((own.part ? x[0] : x[16]) * by_low, (own.part ? x[1] : x[17]) * by_low,
                                       (own.part ? x[2] : x[18]) * by_high, (own.part ? x[3] : x[19]) * by_high);
  }
  ptx::sync_threads(1 + own.half, 2 * kWarpgroup);
  const float4* passed = &shared.passed[own.half][own.part][0][thread];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float4 other = passed[j * kWarpgroup];
    const float* x = sums + 4 * j;
    scores[4 * j] = fmaf(own.part ? x[16] : x[0], by_low, other.x);
    scores[4 * j + 1] = fmaf(own.part ? x[17] : x[1], by_low, other.y);
    scores[4 * j + 2] = fmaf(own.part ? x[18] : x[2], by_high, other.z);
    scores[4 * j + 3] = fmaf(own.part ? x[19] : x[3], by_high, other.w);
  }
}

// The softmax: maxima of the scores, probabilities relative to them, and sums of these.
template <bool kGroups>
__device__ __forceinline__ void take_softmax(SharedMemory& shared, const Lane& own, float (&scores)[16]) {
  const int low = own.low(), head = own.head();
  // Where the row lies that this thread names of the matrices that the warp stores: its place among the fragments'
  // rows.
  const int x = turned(own.lane % 8);
  const int stored = kHalf * own.half + 16 * own.warp + 2 * (x & 3) + (x >> 2) + (own.lane & 8);
  const float scale_low = scale_of<kGroups>(shared.behind(low));
  const float scale_high = scale_of<kGroups>(shared.behind(low + 8));
  const bool sees_low = shared.behind(low).visible, sees_high = shared.behind(low + 8).visible;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (!sees_low) scores[4 * j] = scores[4 * j + 1] = -INFINITY;
    if (!sees_high) scores[4 * j + 2] = scores[4 * j + 3] = -INFINITY;
  }
  float eight[8];  // of a head each
  const float log_low = ptx::log2_fast(scale_low), log_high = ptx::log2_fast(scale_high);
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    eight[2 * j] = fmaxf(scores[4 * j] + log_low, scores[4 * j + 2] + log_high);
    eight[2 * j + 1] = fmaxf(scores[4 * j + 1] + log_low, scores[4 * j + 3] + log_high);
  }
  reduce_spread(eight, own.lane, [](float a, float b) { return fmaxf(a, b); });
  atomicMax(&shared.most[head], ordered(eight[0]));
  __syncthreads();  // the maxima are there, and what was passed was read: probabilities take its place

#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t scaled[4], plain[4];  // of sixteen heads, rows low and high: eight heads, and the next eight
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int j = 2 * pair + h;
      const int2 most = *reinterpret_cast<const int2*>(&shared.most[32 * own.part + 8 * j + 2 * own.quarter]);
      float reference[2] = {from_ordered(most.x), from_ordered(most.y)};
      float p[4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        if (reference[k] == -INFINITY) reference[k] = 0.0f;
        p[k] = ptx::exp2_fast(scores[4 * j + k] - reference[k]);
        p[2 + k] = ptx::exp2_fast(scores[4 * j + 2 + k] - reference[k]);
        eight[2 * j + k] = p[k] + p[2 + k];
      }
      plain[2 * h] = ptx::bfloat_pair(p[0], p[1]), plain[2 * h + 1] = ptx::bfloat_pair(p[2], p[3]);
      scaled[2 * h] = ptx::half_pair(p[0] * scale_low, p[1] * scale_low);
      scaled[2 * h + 1] = ptx::half_pair(p[2] * scale_high, p[3] * scale_high);
    }
    const uint32_t at = swizzled(stored, 4 * own.part + 2 * pair + (own.lane >> 4));
    ptx::store_matrices(ptx::shared_address(shared.p) + at, scaled);
    ptx::store_matrices(ptx::shared_address(shared.p_rope) + at, plain);
  }
  reduce_spread(eight, own.lane, [](float a, float b) { return a + b; });
  shared.sum[4 * own.half + own.warp][head] = eight[0];
}

// The first of the two values that a thread has of a tile of 64: warpgroups 0 to 2 have 128 values each, the last 384
// to 447 and in its second tile the RoPE half.
template <bool kLast>
__device__ __forceinline__ int first_value(const Lane& own, int tile) {
  if (kLast) return (tile ? kNope : 384) + 16 * own.warp + 2 * own.g;
  return 128 * own.group + 32 * own.warp + 4 * own.g + 2 * tile;
}

// out = values by probabilities.
template <bool kGroups, bool kLast>
__device__ __forceinline__ void add_values(const SharedMemory& shared, const Lane& own, float (&out)[2][32]) {
  uint64_t p = ptx::tile_descriptor(ptx::shared_address(shared.p));
  uint64_t p_rope = ptx::tile_descriptor(ptx::shared_address(shared.p_rope));
  const int first = first_value<kLast>(own, 0);
  const uint8_t* rows = shared.rows + own.quarter * kPitch;
  uint32_t words[4], plain[4];  // of the step's four rows: codes; of the RoPE half
  const auto load = [&](int step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint8_t* from = rows + (16 * step + 4 * r) * kPitch;
      if constexpr (kLast) {
        words[r] = *reinterpret_cast<const uint16_t*>(from + first);
        plain[r] = *reinterpret_cast<const uint32_t*>(from + kNope + 32 * own.warp + 4 * own.g);
      } else {
        words[r] = *reinterpret_cast<const uint32_t*>(from + first);
      }
    }
  };
  load(0);
#pragma unroll 2
  for (int step = 0; step < kRows / 16; ++step) {
    // a[tile][0]: value 0, rows 0 and 1; [1]: value 1; [2]: value 0, rows 2 and 3; [3]: value 1.
    uint32_t a[2][4];
    ptx::halves_of_e4m3(__byte_perm(words[0], words[1], 0x5140), &a[0][0], &a[0][1]);
    ptx::halves_of_e4m3(__byte_perm(words[2], words[3], 0x5140), &a[0][2], &a[0][3]);
    if constexpr (kLast) {
      a[1][0] = __byte_perm(plain[0], plain[1], 0x5410), a[1][1] = __byte_perm(plain[0], plain[1], 0x7632);
      a[1][2] = __byte_perm(plain[2], plain[3], 0x5410), a[1][3] = __byte_perm(plain[2], plain[3], 0x7632);
    } else {
      ptx::halves_of_e4m3(__byte_perm(words[0], words[1], 0x7362), &a[1][0], &a[1][1]);
      ptx::halves_of_e4m3(__byte_perm(words[2], words[3], 0x7362), &a[1][2], &a[1][3]);
    }
    if constexpr (kGroups) {
      const auto factor = [&](int r) -> uint32_t {
        return shared.behind(16 * step + own.quarter + 4 * r).factor[first / 64];
      };
      const uint32_t factors[2] = {factor(0) | factor(1) << 16, factor(2) | factor(3) << 16};
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        a[0][v] = ptx::multiply_halves(a[0][v], factors[v / 2]);
        if (!kLast) a[1][v] = ptx::multiply_halves(a[1][v], factors[v / 2]);
      }
    }
    ptx::products_fence();
    ptx::product_f16<1>(out[0], a[0], p);
    if constexpr (kLast) {
      ptx::product_bf16<1>(out[1], a[1], p_rope);
    } else {
      ptx::product_f16<1>(out[1], a[1], p);
    }
    ptx::products_commit();
    if (step + 1 < kRows / 16) load(step + 1);
    ptx::products_wait<0>();
    p += 128, p_rope += 128;
  }
}

// The output of a warpgroup: float32 to where it belongs, bfloat16 to shared memory, from where it goes in one piece a
// head.
template <bool kFloat, bool kLast>
__device__ __forceinline__ void store_values(const AttendCall& call, SharedMemory& shared, const Lane& own, int64_t t,
                                             int first_head, int heads, const float (&out)[2][32]) {
  float c = 1.0f, s = 0.0f;
  if (kLast && call.cos) {
    const int64_t pair = t * (kRope / 2) + (first_value<kLast>(own, 1) - kNope) / 2;
    c = __ldg(call.cos + pair), s = __ldg(call.sin + pair);
  }
  const int first = first_value<kLast>(own, 0), second = first_value<kLast>(own, 1);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int head = 8 * j + 2 * own.quarter + k;
      const float inverse = shared.inverse[head];
      float4 x = make_float4(out[0][4 * j + k] * inverse, out[0][4 * j + 2 + k] * inverse, out[1][4 * j + k] * inverse,
                             out[1][4 * j + 2 + k] * inverse);
      if (kLast) x = make_float4(x.x, x.y, x.z * c + x.w * s, x.w * c - x.z * s);  // rotated back
      if constexpr (kFloat) {
        if (head >= heads) continue;
        float* to = static_cast<float*>(call.out) + (t * call.heads + first_head + head) * kWidth;
        *reinterpret_cast<float2*>(to + first) = make_float2(x.x, x.y);
        *reinterpret_cast<float2*>(to + second) = make_float2(x.z, x.w);
      } else {
        uint8_t* to = shared.out + head * kOutPitch;
        const uint32_t low = ptx::bfloat_pair(x.x, x.y), high = ptx::bfloat_pair(x.z, x.w);
        if constexpr (kLast) {
          *reinterpret_cast<uint32_t*>(to + 2 * first) = low, *reinterpret_cast<uint32_t*>(to + 2 * second) = high;
        } else {
          *reinterpret_cast<uint2*>(to + 2 * first) = make_uint2(low, high);
        }
      }
    }
  }
}

// Zeros for a token that is padding.
template <bool kFloat>
__device__ __forceinline__ void store_nothing(const AttendCall& call, int64_t t, int first_head, int heads) {
  constexpr int kVectors = kWidth * (kFloat ? 4 : 2) / 16;
  uint4* to = static_cast<uint4*>(call.out) + (t * call.heads + first_head) * kVectors;
  for (int i = threadIdx.x; i < heads * kVectors; i += kThreads) to[i] = make_uint4(0, 0, 0, 0);
}

template <bool kGroups, bool kFloat>
__global__ void __launch_bounds__(kThreads, 1) attend_kernel(const __grid_constant__ AttendCall call) {
  extern __shared__ __align__(1024) uint8_t raw[];  // as the swizzle needs it
  using T = std::conditional_t<kFloat, float, BFloat16>;
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(raw);
  const int64_t t = blockIdx.z;
  const int first_head = blockIdx.y * kHeads, heads = min(kHeads, static_cast<int>(call.heads) - first_head);

  Queries<T> queries;
  queries.load(static_cast<const T*>(call.q) + (t * call.heads + first_head) * kWidth, heads);
  const int32_t slot = __ldg(call.slots + t), position = __ldg(call.positions + t);
  if (!call.is_slot(slot) || position < 0) {  // padding
    store_nothing<kFloat>(call, t, first_head, heads);
    return;
  }
  fetch_rows<kGroups>(call, shared, slot, position, t);
  if (threadIdx.x < kHeads) shared.most[threadIdx.x] = ordered(-INFINITY);
  queries.store(call, shared, t);
  ptx::fence_shared_proxy();
  ptx::copies_wait_all();
  __syncwarp();
  if constexpr (kGroups) {
    if (threadIdx.x % 8 < 2) unpack_scales(shared.behind(kHalf * (threadIdx.x % 8) + threadIdx.x / 8));
  }
  __syncthreads();

  const Lane own;
  {
    // Of half of the heads: [4 j] and the next are of row `low` and heads 8 j + 2 quarter and the next, the two after
    // them of the other row.
    float scores[16];
    // Queries that are not bfloat16 from the start come in two parts.
    score_rows<kGroups>(shared, own, kFloat || call.cos, call.scale * kLog2e, scores);
    take_softmax<kGroups>(shared, own, scores);
  }
  ptx::fence_shared_proxy();
  __syncthreads();

  if (threadIdx.x < kHeads) {  // a head each; 0 for one that saw nothing, whose sums are 0
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < 8; ++w) sum += shared.sum[w][threadIdx.x];
    const float top = from_ordered(shared.most[threadIdx.x]), reference = top == -INFINITY ? 0.0f : top;
    const float sink = static_cast<int>(threadIdx.x) < heads ? __ldg(call.sink + first_head + threadIdx.x) : 0.0f;
    shared.inverse[threadIdx.x] = sum == 0.0f ? 0.0f : 1.0f / (sum + ptx::exp2_fast(sink * kLog2e - reference));
  }
  float out[2][32];
#pragma unroll
  for (int i = 0; i < 32; ++i) out[0][i] = out[1][i] = 0.0f;
  if (own.group < 3) {
    add_values<kGroups, false>(shared, own, out);
  } else {
    add_values<kGroups, true>(shared, own, out);
  }
  __syncthreads();
  if (own.group < 3) {
    store_values<kFloat, false>(call, shared, own, t, first_head, heads, out);
  } else {
    store_values<kFloat, true>(call, shared, own, t, first_head, heads, out);
  }
  if constexpr (!kFloat) {
    ptx::fence_shared_proxy();
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < heads) {
      BFloat16* to = static_cast<BFloat16*>(call.out) + (t * call.heads + first_head + threadIdx.x) * kWidth;
      ptx::store_bulk(to, ptx::shared_address(shared.out + threadIdx.x * kOutPitch), 2 * kWidth);
      ptx::stores_wait_read();  // shared memory ends with the thread block
    }
  }
}

}  // namespace dsv4::attend_window

#endif  // DSV4_ATTEND_WINDOW_CUH_
