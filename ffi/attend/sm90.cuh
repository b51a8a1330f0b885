// attend on Hopper (sm_90a): one thread block a token, 64 heads and a part of the rows.
//
// Records are never dequantised in memory. With k8 a row's codes, s its scale and r its RoPE half,
//   score = s (q_nope . k8) + q_rope . r,   out_nope = sum (p s) k8,   out_rope = sum p r,
// so that codes go from shared memory through registers into the tensor cores: E4M3 is exact in float16. Both products
// are transposed, rows or values by heads, because a warpgroup takes the first factor from registers.
//
// Three warpgroups. The first multiplies a block of 64 rows with the queries and takes its softmax; the other two hold the
// output, 256 values of 64 heads each, and multiply the block's probabilities with its values, while the first is at the
// next block. Blocks of a cluster share the rows of a token and add up in shared memory.
#ifndef DSV4_ATTEND_SM90_CUH_
#define DSV4_ATTEND_SM90_CUH_

#include <cuda_fp16.h>

#include "attend/op.h"
#include "attend/ptx.cuh"

namespace dsv4::attend_sm90 {

constexpr int kNope = 448, kRope = 64, kWidth = kNope + kRope;
constexpr int kHeads = 64;   // of a thread block
constexpr int kRows = 64;    // of a block of rows
constexpr int kStages = 3;   // blocks of rows in shared memory: one coming, one at the scores, one at the output
constexpr int kPitch = 608;  // bytes of a row in shared memory: 448 + 128 and 32 against bank conflicts
constexpr int kWarpgroup = 128, kThreads = 3 * kWarpgroup;
constexpr int kChunks = kNope / 64;
constexpr int kPartPitch = kWidth + 4;  // floats of a head's sum, when a cluster adds up
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kRescaleAbove = 8.0f;  // a reference is kept until the maximum exceeds it by 2^8

struct SharedMemory {
  union {
    struct {
      uint8_t q[9][kHeads * 128];  // 64 values of every head, swizzled; the last two: RoPE, bfloat16, and what that lacks
      uint8_t rows[kStages][kRows * kPitch];
      uint8_t p[2][kRows * 128];            // probability times scale, float16, a row of 64 heads, swizzled
      uint8_t p_rope[2][kRows * 128];       // probability, bfloat16
    };
    float part[kHeads * kPartPitch];        // the sum of this block of a cluster
  };
  uint64_t scale[kStages][kRows];           // as stored: a float, or eight bytes
  float row_scale[kStages][kRows];          // the largest of a row's scales
  uint16_t factor[kStages][kChunks][kRows];  // float16: scale of 64 values by the largest
  uint8_t visible[kStages][kRows];
  float alpha[2][kHeads];                   // what the output so far is multiplied by
  float partial[4][kHeads];                 // of each warp
  float reference[kHeads];                  // of the block's probabilities
  float top[kHeads], total[kHeads];         // reference and sum of the softmax
  float inverse[kHeads];                    // of the sum with the sink, for a thread block alone
  int rescale[2][2], settled[2];
  uint64_t full[kStages], empty[kStages], p_full[2], p_empty[2], queries;
};
constexpr int kSharedBytes = sizeof(SharedMemory) + 1024;  // to begin at a multiple of 1024

// Rows of a thread block of 64 heads in the fragments of a product: row g of 16 lies at g with the middle bits turned,
// so that eight lanes that load together meet no bank twice.
__device__ __forceinline__ int turned(int g) { return (g & 4) | ((g >> 1) & 1) | ((g & 1) << 1); }
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// What the token of a thread block sees.
struct Token {
  int32_t slot, position;
  int64_t visible;             // entries
  int32_t first_fresh;         // position of the step's first token; beyond every position without fresh rows
  const int32_t* fresh_rows;   // token index of the positions from first_fresh on
  int window_blocks, blocks;   // of 64 rows; those of the window come first
};

__device__ __forceinline__ Token token_of(const AttendCall& call, int64_t t) {
  Token token{};
  token.slot = call.slots[t], token.position = call.positions[t];
  if (!call.is_slot(token.slot) || token.position < 0) return token;
  token.first_fresh = 0x7FFFFFFF;
  if (call.has_fresh) {
    const int64_t segment = call.segment_rows[t] / call.per_segment;
    if (segment < call.num_segments) {
      token.first_fresh = call.starts[segment];
      token.fresh_rows = call.segment_tokens + segment * call.per_segment;
    }
  }
  token.window_blocks = static_cast<int>((call.window + kRows - 1) / kRows);
  token.blocks = token.window_blocks;
  if (call.has_entries) {
    token.visible = call.visible(token.position);
    const int64_t rows = call.selected ? call.chosen : token.visible;
    token.blocks += static_cast<int>((rows + kRows - 1) / kRows);
  }
  return token;
}

// Half of a row: its codes, or its RoPE half.
struct Row {
  const void* values;  // null: not visible
  const void* scale;
};
__device__ __forceinline__ Row row_at(const ReadRecords& records, int64_t index, bool codes) {
  const void* scale = static_cast<const uint8_t*>(records.scale) + index * (records.scale_width ? 8 : 4);
  if (codes) return {records.nope + index * kNope, scale};
  return {records.rope + index * kRope, scale};
}

__device__ __forceinline__ int64_t entry_of(const AttendCall& call, const Token& token, int64_t t, int block, int row) {
  if (block < token.window_blocks || block >= token.blocks) return -1;
  const int64_t i = static_cast<int64_t>(block - token.window_blocks) * kRows + row;
  if (!call.selected) return i;
  return i < call.chosen ? __ldg(call.selected + t * call.chosen + i) : -1;
}
__device__ __forceinline__ Row row_of(const AttendCall& call, const Token& token, int block, int row, int64_t entry,
                                      bool codes) {
  if (block >= token.blocks) return {};
  if (block >= token.window_blocks) {
    if (entry < 0 || entry >= token.visible) return {};
    // In 32 bits: a division of 64 takes as long as the load that follows.
    const uint32_t e = static_cast<uint32_t>(entry), per_block = static_cast<uint32_t>(call.per_block);
    const uint32_t column = e / per_block;
    if (column >= call.columns) return {};
    const int32_t place = __ldg(call.table + token.slot * call.columns + column);
    if (place < 0 || place >= call.num_blocks) return {};
    return row_at(call.pool, place * call.per_block + (e - column * per_block), codes);
  }
  const int64_t back = call.window - 1 - (static_cast<int64_t>(block) * kRows + row);
  const int64_t position = token.position - back;
  if (back < 0 || position < 0) return {};
  if (position < token.first_fresh) {
    const uint32_t at = modulo(static_cast<uint32_t>(position), static_cast<uint32_t>(call.ring_rows));
    return row_at(call.ring, token.slot * call.ring_rows + at, codes);
  }
  const int32_t index = token.fresh_rows[position - token.first_fresh];
  return index < 0 || index >= call.tokens ? Row{} : row_at(call.fresh, index, codes);
}

__device__ __forceinline__ uint32_t word_of(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

__device__ __forceinline__ float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load_pair(const BFloat16* from) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Queries, from `from` (heads, 512): normed and rotated where they come raw, and stored in the order in which the
// fragments of rows have values. A lane has 16 values of a head, in an order of its own: so neither the loads nor the
// stores of a warp meet a bank twice.
template <typename T>
__device__ __forceinline__ void take_queries(const AttendCall& call, SharedMemory& shared, const T* from, int64_t t,
                                             int heads) {
  const int lane = threadIdx.x % 32, chunk = lane / 4;
  const bool rope = chunk == kChunks, raw = call.cos != nullptr;
  float2 turn[8];  // cosine and sine of pair i ^ chunk
  if (raw && rope) {
    const int64_t first = t * (kRope / 2) + (lane - 4 * kChunks) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) turn[i] = make_float2(__ldg(call.cos + first + (i ^ kChunks)), __ldg(call.sin + first + (i ^ kChunks)));
  }
  uint8_t* tile = shared.q[chunk] + 4 * (lane % 4);
#pragma unroll 2
  for (int head = threadIdx.x / 32; head < kHeads; head += kThreads / 32) {
    float2 x[8] = {};
    if (head < heads) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = load_pair(from + head * kWidth + lane * 16 + 2 * (i ^ chunk));
    }
    if (raw) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(x[i].y, x[i].y, fmaf(x[i].x, x[i].x, squares));
#pragma unroll
      for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
      const float norm = rsqrtf(squares / kWidth + call.eps);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i].x *= norm, x[i].y *= norm;
      if (rope) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 v = x[i];
          x[i] = make_float2(v.x * turn[i].x - v.y * turn[i].y, v.x * turn[i].y + v.y * turn[i].x);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = rope ? ptx::bfloat_pair(x[i].x, x[i].y) : ptx::half_pair(x[i].x, x[i].y);
      const uint32_t at = swizzled(head, i ^ chunk);
      *reinterpret_cast<uint32_t*>(tile + at) = pair;
      if (rope) {
        const float low = x[i].x - __uint_as_float(pair << 16), high = x[i].y - __uint_as_float(pair & 0xFFFF0000u);
        *reinterpret_cast<uint32_t*>(tile + kHeads * 128 + at) = ptx::bfloat_pair(low, high);
      }
    }
  }
}

// Fetches half of a row; with the codes comes the scale.
template <bool kGroups>
__device__ __forceinline__ void fetch(SharedMemory& shared, int stage, const Row& row, int own) {
  const int index = own % kRows;
  const bool codes = own < kRows;
  const uint32_t full = ptx::shared_address(&shared.full[stage]);
  uint8_t* place = shared.rows[stage] + index * kPitch + (codes ? 0 : kNope);
  if (row.values) {
    ptx::fence_shared_proxy();  // the place may have been filled with zeros
    const uint32_t bytes = codes ? kNope : 2 * kRope;
    if (codes) {
      shared.visible[stage][index] = 1;
      constexpr int kBytes = kGroups ? 8 : 4;
      ptx::copy_small<kBytes>(ptx::shared_address(&shared.scale[stage][index]), row.scale);
      ptx::barrier_arrive_after_copies(full);
    }
    ptx::barrier_arrive_expect(full, bytes);
    ptx::copy_bulk(ptx::shared_address(place), row.values, bytes, full);
  } else {  // its probability is 0, and 0 times what lies there must be 0
    const int words = (codes ? kNope : 2 * kRope) / 16;
    for (int i = 0; i < words; ++i) reinterpret_cast<uint4*>(place)[i] = make_uint4(0, 0, 0, 0);
    if (codes) {
      shared.visible[stage][index] = 0;
      shared.scale[stage][index] = 0;
      ptx::barrier_arrive(full);
    }
    ptx::barrier_arrive(full);
  }
}

// The largest of a row's scales and, relative to it, that of every 64 values.
__device__ __forceinline__ void unpack_scales(SharedMemory& shared, int stage) {
  const int row = threadIdx.x;
  if (row >= kRows) return;
  const uint64_t stored = shared.scale[stage][row];
  int largest = 1;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) largest = max(largest, static_cast<int>((stored >> (8 * i)) & 0xFF));
  if (largest == 255) largest = 254;
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int byte = static_cast<int>((stored >> (8 * i)) & 0xFF), below = largest - byte;
    uint16_t factor = below > 24 ? 0 : below > 14 ? static_cast<uint16_t>(1 << (24 - below))
                                                  : static_cast<uint16_t>((15 - below) << 10);
    if (byte == 255) factor = 0x7E00;
    shared.factor[stage][i][row] = factor;
  }
  shared.row_scale[stage][row] = shared.visible[stage][row] ? __uint_as_float(static_cast<uint32_t>(largest) << 23) : 0.0f;
}

// What a row's codes are multiplied by, after unpack_scales where there are several scales.
template <bool kGroups>
__device__ __forceinline__ float scale_of(const SharedMemory& shared, int stage, int row) {
  if constexpr (kGroups) return shared.row_scale[stage][row];
  return __uint_as_float(static_cast<uint32_t>(shared.scale[stage][row]));
}

// Reduces 16 values over the eight lanes that have the same `quarter`: lane g of them ends with values 2 g and 2 g + 1, in
// x[0] and x[1].
// (A template, as the compiler leaves a loop over halves rolled and x in local memory.)
template <int kHalf = 8, typename Combine>
__device__ __forceinline__ void reduce_spread(float (&x)[16], int lane, Combine combine) {
  const bool upper = lane & (2 * kHalf);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? x[i] : x[i + kHalf], 2 * kHalf);
    x[i] = combine(upper ? x[i + kHalf] : x[i], other);
  }
  if constexpr (kHalf > 2) reduce_spread<kHalf / 2>(x, lane, combine);
}

// The half of a row that thread `own` of the fetching warpgroup brings of a block.
__device__ __forceinline__ Row find(const AttendCall& call, const Token& token, int64_t t, int block, int own) {
  const int row = own % kRows;
  return row_of(call, token, block, row, entry_of(call, token, t, block, row), own < kRows);
}

// What sums relative to `top` are multiplied by; 0 for a head that saw nothing, whose sums are 0.
__device__ __forceinline__ float inverse_of(float top, float total, float sink) {
  const float reference = top == -INFINITY ? 0.0f : top;
  return total == 0.0f ? 0.0f : 1.0f / (total + ptx::exp2_fast(sink * kLog2e - reference));
}

// The first warpgroup: scores and softmax.
template <bool kGroups>
__device__ __forceinline__ void score_rows(const AttendCall& call, SharedMemory& shared, int blocks, int first_head) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  const int low = 16 * warp + turned(g), high = low + 8;  // this thread's rows
  // Where the row lies that this thread names of the matrices that the warp stores, rows low and high in turn: its place
  // among the rows of the second product's fragments.
  const int x = turned(lane % 8), stored = 16 * warp + 2 * (x & 3) + (x >> 2) + (lane & 8);
  const float factor = call.scale * kLog2e;

  float total[16] = {};     // of this thread's rows
  float top = -INFINITY;    // reference of head threadIdx.x
  bool settled = false;     // every head has a reference

  for (int i = 0; i < blocks; ++i) {
    const int stage = i % kStages, buffer = i & 1;
    ptx::barrier_wait(ptx::shared_address(&shared.full[stage]), (i / kStages) & 1);
    if constexpr (kGroups) {
      unpack_scales(shared, stage);
      ptx::sync_threads(1, kWarpgroup);
    }
    const uint8_t* rows = shared.rows[stage];

    float scores[32], rope[32];
    {
      // RoPE halves first: their product does not wait for conversions.
      uint32_t a[4][4];
      const uint4* from[2] = {reinterpret_cast<const uint4*>(rows + low * kPitch + kNope + 32 * quarter),
                              reinterpret_cast<const uint4*>(rows + high * kPitch + kNope + 32 * quarter)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 l = from[0][half], h = from[1][half];
        a[2 * half][0] = l.x, a[2 * half][1] = h.x, a[2 * half][2] = l.y, a[2 * half][3] = h.y;
        a[2 * half + 1][0] = l.z, a[2 * half + 1][1] = h.z, a[2 * half + 1][2] = l.w, a[2 * half + 1][3] = h.w;
      }
      const uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[7]));
      ptx::products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::product_bf16<0>(rope, a[step], b + 2 * step, step > 0);
      if (call.is_float || call.cos) {  // queries that are not bfloat16 from the start
#pragma unroll
        for (int step = 0; step < 4; ++step) ptx::product_bf16<0>(rope, a[step], b + (kHeads * 128 >> 4) + 2 * step);
      }
      ptx::products_commit();
    }
    uint32_t a[2][4][4];
    const uint8_t* codes_low = rows + low * kPitch + 16 * quarter;
    const uint8_t* codes_high = rows + high * kPitch + 16 * quarter;
    uint4 l = *reinterpret_cast<const uint4*>(codes_low), h = *reinterpret_cast<const uint4*>(codes_high);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t(&now)[4][4] = a[chunk & 1];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t wl = word_of(l, step), wh = word_of(h, step);
        now[step][0] = ptx::halves_of_e4m3(wl), now[step][2] = ptx::halves_of_e4m3(wl >> 16);
        now[step][1] = ptx::halves_of_e4m3(wh), now[step][3] = ptx::halves_of_e4m3(wh >> 16);
      }
      if constexpr (kGroups) {
        const uint32_t fl = shared.factor[stage][chunk][low] * 0x10001u, fh = shared.factor[stage][chunk][high] * 0x10001u;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          now[step][0] = ptx::multiply_halves(now[step][0], fl), now[step][2] = ptx::multiply_halves(now[step][2], fl);
          now[step][1] = ptx::multiply_halves(now[step][1], fh), now[step][3] = ptx::multiply_halves(now[step][3], fh);
        }
      }
      if (chunk + 1 < kChunks) {  // they come while the products run
        l = *reinterpret_cast<const uint4*>(codes_low + 64 * (chunk + 1));
        h = *reinterpret_cast<const uint4*>(codes_high + 64 * (chunk + 1));
      }
      const uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[chunk]));
      ptx::products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::product_f16<0>(scores, now[step], b + 2 * step, chunk + step > 0);
      ptx::products_commit();
      ptx::products_wait<1>();
    }
    ptx::products_wait<0>();

    // Softmax of the block: this thread has heads 8 j + 2 quarter and the next, in rows low and high.
    const bool sees_low = shared.visible[stage][low], sees_high = shared.visible[stage][high];
    const float scale_low = scale_of<kGroups>(shared, stage, low), scale_high = scale_of<kGroups>(shared, stage, high);
    const float log_low = ptx::log2_fast(fmaxf(scale_low, 1e-30f)), log_high = ptx::log2_fast(fmaxf(scale_high, 1e-30f));
    float most[16];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        float& a_low = scores[4 * j + k];
        float& a_high = scores[4 * j + 2 + k];
        a_low = sees_low ? factor * fmaf(scale_low, a_low, rope[4 * j + k]) : -INFINITY;
        a_high = sees_high ? factor * fmaf(scale_high, a_high, rope[4 * j + 2 + k]) : -INFINITY;
        most[2 * j + k] = fmaxf(a_low + log_low, a_high + log_high);
      }
    }
    // Most blocks raise no head's reference: then one vote takes the place of the maxima.
    bool above = !settled;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 reference = *reinterpret_cast<const float2*>(&shared.reference[8 * j + 2 * quarter]);
      above |= most[2 * j] > reference.x + kRescaleAbove || most[2 * j + 1] > reference.y + kRescaleAbove;
    }
    above = ptx::any_of_threads(1, kWarpgroup, above);
    if (i >= 2) ptx::barrier_wait(ptx::shared_address(&shared.p_empty[buffer]), ((i >> 1) - 1) & 1);
    if (above) {
      reduce_spread(most, lane, [](float a, float b) { return fmaxf(a, b); });
      *reinterpret_cast<float2*>(&shared.partial[warp][8 * g + 2 * quarter]) = make_float2(most[0], most[1]);
      ptx::sync_threads(1, kWarpgroup);
      if (threadIdx.x < kHeads) {  // a head each
        const int head = threadIdx.x;
        const float seen = fmaxf(fmaxf(shared.partial[0][head], shared.partial[1][head]),
                                 fmaxf(shared.partial[2][head], shared.partial[3][head]));
        const bool raise = seen > top + kRescaleAbove || (top == -INFINITY && seen > -INFINITY);
        shared.alpha[buffer][head] = raise ? ptx::exp2_fast(top - seen) : 1.0f;
        if (raise) top = seen;
        shared.reference[head] = top == -INFINITY ? 0.0f : top;
        const bool rescale = __any_sync(0xFFFFFFFFu, raise) && i > 0, all = __all_sync(0xFFFFFFFFu, top > -INFINITY);
        if (lane == 0) shared.rescale[buffer][warp] = rescale, shared.settled[warp] = all;
      }
      ptx::sync_threads(1, kWarpgroup);
      settled = shared.settled[0] & shared.settled[1];
      if (shared.rescale[buffer][0] | shared.rescale[buffer][1]) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[buffer][8 * j + 2 * quarter]);
          total[2 * j] *= alpha.x, total[2 * j + 1] *= alpha.y;
        }
      }
    } else if (threadIdx.x < 2) {
      shared.rescale[buffer][threadIdx.x] = 0;
    }
    float2 reference[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) reference[j] = *reinterpret_cast<const float2*>(&shared.reference[8 * j + 2 * quarter]);
    const uint32_t p = ptx::shared_address(shared.p[buffer]), p_rope = ptx::shared_address(shared.p_rope[buffer]);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      uint32_t scaled[4], plain[4];  // rows low and high of eight heads, and of the next eight
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int j = 2 * pair + half;
        float pl[2], ph[2];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          pl[k] = ptx::exp2_fast(scores[4 * j + k] - (k ? reference[j].y : reference[j].x));
          ph[k] = ptx::exp2_fast(scores[4 * j + 2 + k] - (k ? reference[j].y : reference[j].x));
          total[2 * j + k] += pl[k] + ph[k];
        }
        plain[2 * half] = ptx::bfloat_pair(pl[0], pl[1]), plain[2 * half + 1] = ptx::bfloat_pair(ph[0], ph[1]);
        scaled[2 * half] = ptx::half_pair(pl[0] * scale_low, pl[1] * scale_low);
        scaled[2 * half + 1] = ptx::half_pair(ph[0] * scale_high, ph[1] * scale_high);
      }
      const uint32_t at = swizzled(stored, 2 * pair + (lane >> 4));
      ptx::store_matrices(p_rope + at, plain);
      ptx::store_matrices(p + at, scaled);
    }
    ptx::fence_shared_proxy();
    ptx::barrier_arrive(ptx::shared_address(&shared.p_full[buffer]));
  }

  reduce_spread(total, lane, [](float a, float b) { return a + b; });
  ptx::sync_threads(1, kWarpgroup);  // the maxima were read
  *reinterpret_cast<float2*>(&shared.partial[warp][8 * g + 2 * quarter]) = make_float2(total[0], total[1]);
  ptx::sync_threads(1, kWarpgroup);
  if (threadIdx.x < kHeads) {
    const int head = threadIdx.x;
    shared.top[head] = top;
    const float sum = (shared.partial[0][head] + shared.partial[1][head]) + (shared.partial[2][head] + shared.partial[3][head]);
    shared.total[head] = sum;
    if (gridDim.x == 1 && first_head + head < call.heads) {
      shared.inverse[head] = inverse_of(top, sum, __ldg(call.sink + first_head + head));
    }
  }
}

// Two rows' codes of four values -> halves (row a, row b) of each value.
__device__ __forceinline__ void pair_rows(uint32_t a, uint32_t b, uint32_t (&out)[4]) {
  const uint32_t first = __byte_perm(a, b, 0x5140), last = __byte_perm(a, b, 0x7362);
  out[0] = ptx::halves_of_e4m3(first), out[1] = ptx::halves_of_e4m3(first >> 16);
  out[2] = ptx::halves_of_e4m3(last), out[3] = ptx::halves_of_e4m3(last >> 16);
}

// The first of the two values that a thread has of a tile of 64: warpgroup 0 has values 0 to 255; warpgroup 1 256 to 447 in
// tiles 0 to 2, and in tile 3 the RoPE half.
template <int kPart>
__device__ __forceinline__ int first_value(int tile, int warp, int g) {
  if (kPart == 0 || tile < 2) return 256 * kPart + 128 * (tile / 2) + 32 * warp + 4 * g + 2 * (tile % 2);
  return (tile == 2 ? 384 : kNope) + 16 * warp + 2 * g;
}

// The codes that a thread has of the `part`-th of eight parts of a block: of four rows, four values or two.
template <int kPart>
__device__ __forceinline__ void load_codes(uint32_t (&words)[4], const uint8_t* rows, int part, int half, int warp, int g,
                                           int quarter) {
  const uint8_t* from = rows + (16 * (part / 2) + quarter) * kPitch + first_value<kPart>(2 * half, warp, g);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (kPart == 0 || half == 0) {
      words[r] = *reinterpret_cast<const uint32_t*>(from + 4 * r * kPitch);
    } else {
      words[r] = *reinterpret_cast<const uint16_t*>(from + 4 * r * kPitch);
    }
  }
}

// The other two: out += values by probabilities. The first of them also fetches rows, which takes the place of a stage as
// soon as both are done with it.
template <bool kGroups, int kPart>
__device__ __forceinline__ void add_values(const AttendCall& call, SharedMemory& shared, const Token& token, int64_t t,
                                           int first, int blocks, float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
    for (int i = 0; i < 32; ++i) out[tile][i] = 0.0f;
  }
  for (int i = 0; i < blocks; ++i) {
    const int stage = i % kStages, buffer = i & 1, own = threadIdx.x % kWarpgroup;
    Row ahead{};
    if (kPart == 0 && i + kStages < blocks) ahead = find(call, token, t, first + i + kStages, own);
    ptx::barrier_wait(ptx::shared_address(&shared.full[stage]), (i / kStages) & 1);
    ptx::barrier_wait(ptx::shared_address(&shared.p_full[buffer]), (i >> 1) & 1);
    if (shared.rescale[buffer][0] | shared.rescale[buffer][1]) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[buffer][8 * j + 2 * quarter]);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          out[tile][4 * j] *= alpha.x, out[tile][4 * j + 1] *= alpha.y;
          out[tile][4 * j + 2] *= alpha.x, out[tile][4 * j + 3] *= alpha.y;
        }
      }
    }
    const uint8_t* rows = shared.rows[stage];
    const uint64_t p = ptx::tile_descriptor(ptx::shared_address(shared.p[buffer]));
    const uint64_t p_rope = ptx::tile_descriptor(ptx::shared_address(shared.p_rope[buffer]));
    // In eight parts, of 16 rows and two tiles each. What a part loads comes while the products of the one before it run;
    // converting that early too would take more registers than there are.
    uint32_t words[4];  // of the part's four rows
    load_codes<kPart>(words, rows, 0, 0, warp, g, quarter);
#pragma unroll 1
    for (int step = 0; step < 4; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t factors[2];  // of both pairs of rows
      if constexpr (kGroups) {
        const uint16_t* factor = shared.factor[stage][first_value<kPart>(2 * half, warp, 0) / 64] + 16 * step + quarter;
        factors[0] = factor[0] | static_cast<uint32_t>(factor[4]) << 16;
        factors[1] = factor[8] | static_cast<uint32_t>(factor[12]) << 16;
      }
      // a[tile][0]: value 0, rows 0 and 1; [1]: value 1; [2]: value 0, rows 2 and 3; [3]: value 1.
      uint32_t a[2][4];
      if (kPart == 0 || half == 0) {
        uint32_t low[4], high[4];
        pair_rows(words[0], words[1], low);
        pair_rows(words[2], words[3], high);
        if constexpr (kGroups) {
#pragma unroll
          for (int v = 0; v < 4; ++v) {
            low[v] = ptx::multiply_halves(low[v], factors[0]);
            high[v] = ptx::multiply_halves(high[v], factors[1]);
          }
        }
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          a[tile][0] = low[2 * tile], a[tile][1] = low[2 * tile + 1];
          a[tile][2] = high[2 * tile], a[tile][3] = high[2 * tile + 1];
        }
      } else {
        const uint32_t low = __byte_perm(words[0], words[1], 0x5140), high = __byte_perm(words[2], words[3], 0x5140);
        a[0][0] = ptx::halves_of_e4m3(low), a[0][1] = ptx::halves_of_e4m3(low >> 16);
        a[0][2] = ptx::halves_of_e4m3(high), a[0][3] = ptx::halves_of_e4m3(high >> 16);
        if constexpr (kGroups) {
#pragma unroll
          for (int v = 0; v < 4; ++v) a[0][v] = ptx::multiply_halves(a[0][v], factors[v / 2]);
        }
        uint32_t r[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          r[n] = *reinterpret_cast<const uint32_t*>(rows + (16 * step + quarter + 4 * n) * kPitch + kNope + 32 * warp + 4 * g);
        }
        a[1][0] = __byte_perm(r[0], r[1], 0x5410), a[1][1] = __byte_perm(r[0], r[1], 0x7632);
        a[1][2] = __byte_perm(r[2], r[3], 0x5410), a[1][3] = __byte_perm(r[2], r[3], 0x7632);
      }
      ptx::products_fence();
      ptx::product_f16<1>(out[2 * half], a[0], p + 128 * step);
      if (kPart == 1 && half == 1) {
        ptx::product_bf16<1>(out[3], a[1], p_rope + 128 * step);
      } else {
        ptx::product_f16<1>(out[2 * half + 1], a[1], p + 128 * step);
      }
      ptx::products_commit();
      if (half == 0 || step < 3) load_codes<kPart>(words, rows, 2 * step + half + 1, half ^ 1, warp, g, quarter);
      ptx::products_wait<0>();
    }
    __syncwarp();
    if (lane == 0) {
      ptx::barrier_arrive(ptx::shared_address(&shared.empty[stage]));
      ptx::barrier_arrive(ptx::shared_address(&shared.p_empty[buffer]));
    }
    if (kPart == 0 && i + kStages < blocks) {
      ptx::barrier_wait(ptx::shared_address(&shared.empty[stage]), (i / kStages) & 1);
      fetch<kGroups>(shared, stage, ahead, own);
    }
  }
}

// Two values of a head, the first at an even place: rotated back where queries came raw, and stored.
__device__ __forceinline__ void store_pair(const AttendCall& call, int64_t t, int64_t head, int value, float a, float b) {
  if (call.cos && value >= kNope) {
    const int64_t pair = t * (kRope / 2) + (value - kNope) / 2;
    const float c = __ldg(call.cos + pair), s = __ldg(call.sin + pair), x = a;
    a = x * c + b * s, b = b * c - x * s;
  }
  const int64_t at = (t * call.heads + head) * kWidth + value;
  if (call.is_float) {
    *reinterpret_cast<float2*>(static_cast<float*>(call.out) + at) = make_float2(a, b);
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<BFloat16*>(call.out) + at) = ptx::bfloat_pair(a, b);
  }
}

// The output of a warpgroup of a thread block alone, from its registers.
template <int kPart>
__device__ __forceinline__ void store_values(const AttendCall& call, const SharedMemory& shared, int64_t t, int first_head,
                                             int heads, const float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  constexpr int kRopeTile = 3;  // of the second part
  float c = 1.0f, s = 0.0f;
  if (kPart == 1 && call.cos) {
    const int64_t pair = t * (kRope / 2) + (first_value<kPart>(kRopeTile, warp, g) - kNope) / 2;
    c = __ldg(call.cos + pair), s = __ldg(call.sin + pair);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int head = 8 * j + 2 * quarter + k;
      if (head >= heads) continue;
      const float inverse = shared.inverse[head];
      const int64_t at = (t * call.heads + first_head + head) * kWidth;
      float a[4], b[4];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile) a[tile] = out[tile][4 * j + k] * inverse, b[tile] = out[tile][4 * j + 2 + k] * inverse;
      if (kPart == 1 && call.cos) {
        const float x = a[kRopeTile], y = b[kRopeTile];
        a[kRopeTile] = x * c + y * s, b[kRopeTile] = y * c - x * s;
      }
#pragma unroll
      for (int tile = 0; tile < 4; tile += 2) {
        const int64_t first = at + first_value<kPart>(tile, warp, g), second = at + first_value<kPart>(tile + 1, warp, g);
        const bool together = kPart == 0 || tile == 0;  // four values in a row
        if (call.is_float) {
          float* to = static_cast<float*>(call.out);
          *reinterpret_cast<float2*>(to + first) = make_float2(a[tile], b[tile]);
          *reinterpret_cast<float2*>(to + second) = make_float2(a[tile + 1], b[tile + 1]);
        } else {
          BFloat16* to = static_cast<BFloat16*>(call.out);
          const uint32_t low = ptx::bfloat_pair(a[tile], b[tile]), high = ptx::bfloat_pair(a[tile + 1], b[tile + 1]);
          if (together) {
            *reinterpret_cast<uint2*>(to + first) = make_uint2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(to + first) = low, *reinterpret_cast<uint32_t*>(to + second) = high;
          }
        }
      }
    }
  }
}

// The sums of a warpgroup, into shared memory.
template <int kPart>
__device__ __forceinline__ void put_values(SharedMemory& shared, const float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    float* to = shared.part + 2 * quarter * kPartPitch + first_value<kPart>(tile, warp, g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        *reinterpret_cast<float2*>(to + (8 * j + k) * kPartPitch) = make_float2(out[tile][4 * j + k], out[tile][4 * j + 2 + k]);
      }
    }
  }
}

template <bool kGroups>
__global__ void __launch_bounds__(kThreads, 1) attend_kernel(const __grid_constant__ AttendCall call) {
  extern __shared__ uint8_t raw[];
  SharedMemory& shared =
      *reinterpret_cast<SharedMemory*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~static_cast<uintptr_t>(1023));
  const int64_t t = blockIdx.z;
  const int first_head = blockIdx.y * kHeads;
  const int splits = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  const Token token = token_of(call, t);
  if (!token.blocks) {  // padding, the same in the whole cluster
    const int heads = min(kHeads, static_cast<int>(call.heads) - first_head);
    for (int i = threadIdx.x + rank * kThreads; i < heads * kWidth / 2; i += kThreads * splits) {
      const int64_t at = (t * call.heads + first_head) * kWidth + 2 * i;
      if (call.is_float) {
        *reinterpret_cast<float2*>(static_cast<float*>(call.out) + at) = make_float2(0.0f, 0.0f);
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<BFloat16*>(call.out) + at) = 0;
      }
    }
    return;
  }
  const int first = static_cast<int>(static_cast<int64_t>(token.blocks) * rank / splits);
  const int end = static_cast<int>(static_cast<int64_t>(token.blocks) * (rank + 1) / splits);

  if (threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&shared.queries), 1);
    for (int i = 0; i < kStages; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.full[i]), 3 * kRows);
      ptx::barrier_init(ptx::shared_address(&shared.empty[i]), 8);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.p_full[i]), kWarpgroup);
      ptx::barrier_init(ptx::shared_address(&shared.p_empty[i]), 8);
    }
  }
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int own = threadIdx.x % kWarpgroup, heads = min(kHeads, static_cast<int>(call.heads) - first_head);
  const int64_t query = (t * call.heads + first_head) * kWidth;
  // Queries in bfloat16 pass through the places of the second and third block of rows.
  const uint32_t arrived = ptx::shared_address(&shared.queries);
  if (!call.is_float && threadIdx.x == 0) {
    const uint32_t bytes = heads * kWidth * 2;
    ptx::barrier_arrive_expect(arrived, bytes);
    ptx::copy_bulk(ptx::shared_address(shared.rows[1]), static_cast<const BFloat16*>(call.q) + query, bytes, arrived);
  }
  Row rows[kStages] = {};
  if (group == 1) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      if (i < end - first) rows[i] = find(call, token, t, first + i, own);
    }
    if (first < end) fetch<kGroups>(shared, 0, rows[0], own);
  }
  if (call.is_float) {
    take_queries(call, shared, static_cast<const float*>(call.q) + query, t, heads);
  } else {
    ptx::barrier_wait(arrived, 0);
    take_queries(call, shared, reinterpret_cast<const BFloat16*>(shared.rows[1]), t, heads);
  }
  ptx::fence_shared_proxy();
  __syncthreads();
  if (group == 1) {
#pragma unroll
    for (int i = 1; i < kStages; ++i) {
      if (i < end - first) fetch<kGroups>(shared, i, rows[i], own);
    }
  }

  const bool in_cluster = splits > 1;
  if (group == 0) {
    score_rows<kGroups>(call, shared, end - first, first_head);
    ptx::sync_threads(2, kThreads);
  } else if (group == 1) {
    float out[4][32];
    add_values<kGroups, 0>(call, shared, token, t, first, end - first, out);
    ptx::sync_threads(2, kThreads);  // rows and queries are not needed any more
    in_cluster ? put_values<0>(shared, out) : store_values<0>(call, shared, t, first_head, heads, out);
  } else {
    float out[4][32];
    add_values<kGroups, 1>(call, shared, token, t, first, end - first, out);
    ptx::sync_threads(2, kThreads);
    in_cluster ? put_values<1>(shared, out) : store_values<1>(call, shared, t, first_head, heads, out);
  }
  if (!in_cluster) return;
  ptx::cluster_sync();

  // Each block of a cluster adds up some of the heads, in the order of the blocks: a warp a head.
  const int lane = threadIdx.x % 32;
  for (int head = rank + splits * (threadIdx.x / 32); head < heads; head += splits * (kThreads / 32)) {
    float top_here = -INFINITY, total_here = 0.0f;  // of block `lane`
    if (lane < splits) {
      top_here = ptx::load_remote(ptx::address_in(ptx::shared_address(&shared.top[head]), lane));
      total_here = ptx::load_remote(ptx::address_in(ptx::shared_address(&shared.total[head]), lane));
    }
    float top = top_here;
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    const float reference = top == -INFINITY ? 0.0f : top;
    // A part without a maximum has sums of 0, or of NaN.
    const float weight_here = ptx::exp2_fast((top_here == -INFINITY ? reference : top_here) - reference);
    const uint32_t part = ptx::shared_address(shared.part + head * kPartPitch + 2 * lane);
    float total = 0.0f;
    float2 sums[8] = {};
#pragma unroll 4
    for (int r = 0; r < splits; ++r) {
      const float weight = __shfl_sync(0xFFFFFFFFu, weight_here, r);
      total = fmaf(weight, __shfl_sync(0xFFFFFFFFu, total_here, r), total);
      const uint32_t from = ptx::address_in(part, r);
      float2 pairs[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) pairs[n] = ptx::load_remote_pair(from + 256 * n);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        sums[n].x = fmaf(weight, pairs[n].x, sums[n].x), sums[n].y = fmaf(weight, pairs[n].y, sums[n].y);
      }
    }
    const float inverse = inverse_of(top, total, __ldg(call.sink + first_head + head));
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      store_pair(call, t, first_head + head, 64 * n + 2 * lane, sums[n].x * inverse, sums[n].y * inverse);
    }
  }
  ptx::cluster_sync();  // others may still read here
}

}  // namespace dsv4::attend_sm90

#endif  // DSV4_ATTEND_SM90_CUH_
