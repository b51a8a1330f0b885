// attend on Hopper (sm_90a) for few tokens, whose time is latency: a thread block a token, 16 heads and a part of its
// rows.
//
// As in sm90.cuh, with k8 a row's codes, s its scale and r its RoPE half,
//   score = s (q_nope . k8) + q_rope . r,   out_nope = sum (p s) k8,   out_rope = sum p r,
// and codes become float16, exactly, in registers. Here heads are the rows of a warp's products (mma m16n8k16): each of
// eight warps fetches and scores eight rows of a block of 64, then holds 64 of the 512 values of the output; the last
// has the RoPE half. What follows from all rows passes through shared memory twice a block: the maxima, the
// probabilities. Thread blocks of a cluster share the rows of a token; each sends its sums to those that add them up.
#ifndef DSV4_ATTEND_FEW_TOKENS_CUH_
#define DSV4_ATTEND_FEW_TOKENS_CUH_

#include <type_traits>

#include "attend/op.h"
#include "cuda/geometry.cuh"
#include "cuda/group_scales.cuh"
#include "cuda/ptx.cuh"

namespace dsv4::attend_few {

constexpr int kNope = V4Record::kNope, kRope = V4Record::kRope, kWidth = V4Record::kDim,
              kChunks = kNope / V4Record::kGroup;
constexpr int kHeads = 16;   // of a thread block
constexpr int kRows = 64;    // of a block of rows
constexpr int kPitch = 608;  // bytes of a row in shared memory: 448 + 128 and 32 against bank conflicts
constexpr int kStages = 3;   // blocks of rows in shared memory
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMostSplits = 16;  // thread blocks of a cluster
constexpr int kUnits = 32;  // in which a thread block's sums are shared out: a warp's, of half its values and heads
constexpr float kLog2e = 1.4426950408889634f;

template <bool kGroups>
struct SharedMemory {
  using Scale = std::conditional_t<kGroups, uint64_t, float>;  // as stored
  uint4 q[4 * kChunks + 8][32];  // a lane's factors: float16; of the RoPE half bfloat16, and what that lacks
  uint4 p[2][kRows / 16][32];    // probabilities times scale, float16; probabilities, bfloat16
  uint8_t rows[kStages][kRows * kPitch];
  Scale scale[kStages][kRows];
  uint16_t factor[kGroups ? 2 : 1][kChunks][kRows];  // float16: scale of 64 values by the row's largest
  float most[kHeads][kWarps], sum[kHeads][kWarps];
  float top[kHeads];
  float turn[2][kRope / 2];  // cosine and sine, where queries come raw
  // From each thread block of the cluster.
  float2 softmax[kMostSplits][kHeads];  // reference and sum
  float4 parts[45][2]
              [32];  // of the units that are added up here; 45: kUnits / splits rounded up, times splits, at most
};
template <bool kGroups>
constexpr int kSharedBytes = sizeof(SharedMemory<kGroups>);
static_assert(kSharedBytes<true> <= 232448, "more than a multiprocessor has");

// Division by what all threads share, prepared on the host.
struct Divisor {
  uint32_t by = 1, inverse = 0xFFFFFFFFu;
  Divisor() = default;
  explicit Divisor(int64_t by) : by(static_cast<uint32_t>(by)), inverse(0xFFFFFFFFu / static_cast<uint32_t>(by)) {}
  __device__ __forceinline__ uint32_t quotient(uint32_t x) const {
    const uint32_t q = __umulhi(x, inverse);  // one too little at most
    return x - q * by >= by ? q + 1 : q;
  }
  __device__ __forceinline__ uint32_t remainder(uint32_t x) const { return x - quotient(x) * by; }
};
struct Divisors {
  Divisor ratio, per_block, ring_rows;
};

// Eight rows of a block as the columns of a product: column g is row row_of_column(g). A lane's two columns of the
// scores are then its rows of the probabilities, and no lane of eight that load together meets another's banks.
__device__ __forceinline__ int row_of_column(int g) {
  return ((g & 4) | ((g >> 1) & 1) | ((g & 1) << 1)) ^ ((g & 4) >> 1);
}

__device__ __forceinline__ uint32_t word_of(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

// What a token sees.
struct Token {
  int32_t slot, position;
  uint32_t visible;           // entries
  int32_t first_fresh;        // position of the step's first token; beyond every position without fresh rows
  const int32_t* fresh_rows;  // token index of the positions from first_fresh on
  int window_rows, blocks;    // of the window, filled up to whole blocks; they come first
};

__device__ __forceinline__ Token token_of(const AttendCall& call, const Divisors& divide, int64_t t) {
  Token token{};
  token.slot = __ldg(call.slots + t), token.position = __ldg(call.positions + t);
  if (!call.is_slot(token.slot) || token.position < 0) return token;
  token.first_fresh = 0x7FFFFFFF;
  if (call.has_fresh) {
    const uint32_t segment = static_cast<uint32_t>(call.segment_rows[t]) / static_cast<uint32_t>(call.per_segment);
    if (segment < call.num_segments) {
      token.first_fresh = call.starts[segment];
      token.fresh_rows = call.segment_tokens + segment * call.per_segment;
    }
  }
  token.window_rows = (static_cast<int>(call.window) + kRows - 1) / kRows * kRows;
  int rows = token.window_rows;
  if (call.has_entries) {
    const uint32_t closed = divide.ratio.quotient(static_cast<uint32_t>(token.position) + 1);
    token.visible = min(closed, static_cast<uint32_t>(call.max_entries));
    rows += call.selected ? static_cast<int>(call.chosen) : static_cast<int>(token.visible);
  }
  token.blocks = (rows + kRows - 1) / kRows;
  return token;
}

// Finds and fetches rows, a lane a quarter of a row's pieces of 16 bytes. To find an entry takes two loads that depend
// on each other; each call of `step` takes one of them for a block of rows to come, so that none waits.
template <bool kGroups>
struct Fetcher {
  const AttendCall& call;
  const Divisors& divide;
  const Token& token;
  SharedMemory<kGroups>& shared;
  int64_t t;
  int first, blocks;                           // of this thread block
  int row, quarter;                            // of this lane, in a block
  int32_t entry = -1, place = -1, within = 0;  // of the block after the next; of the next: block of the pool, row in it

  __device__ __forceinline__ void look(int n) {
    const int i = (first + n) * kRows + row - token.window_rows;
    entry = -1;
    if (n >= blocks || i < 0) return;
    if (!call.selected) {
      entry = i;
    } else if (i < static_cast<int>(call.chosen)) {
      entry = __ldg(call.selected + t * call.chosen + i);
    }
  }
  __device__ __forceinline__ void look_up() {
    place = -1;
    if (static_cast<uint32_t>(entry) >= token.visible) return;
    const uint32_t column = divide.per_block.quotient(entry);
    within = entry - column * divide.per_block.by;
    if (column < static_cast<uint32_t>(call.columns)) place = __ldg(call.table + token.slot * call.columns + column);
  }
  // Where this lane's row of block n is: index among `records`; -1: not visible.
  __device__ __forceinline__ int64_t index_of(int n, const ReadRecords** records) const {
    const int i = (first + n) * kRows + row;
    *records = &call.ring;
    if (i >= token.window_rows) {
      *records = &call.pool;
      return static_cast<uint32_t>(place) < static_cast<uint32_t>(call.num_blocks) ? place * call.per_block + within
                                                                                   : -1;
    }
    const int back = static_cast<int>(call.window) - 1 - i, position = token.position - back;
    if (back < 0 || position < 0) return -1;
    if (position < token.first_fresh) return token.slot * call.ring_rows + divide.ring_rows.remainder(position);
    *records = &call.fresh;
    const int32_t index = token.fresh_rows[position - token.first_fresh];
    return index < call.tokens ? index : -1;
  }

  // Fetches block n. What is not visible is filled with zeros: its probability is 0, and 0 times what lies there must
  // be 0. Returns which of the warp's rows are visible, a bit each.
  __device__ __forceinline__ uint32_t step(int n) {
    uint32_t seen = 0;
    if (n >= 0 && n < blocks) {
      const ReadRecords* records;
      const int64_t found = index_of(n, &records), index = max(found, int64_t{0});
      const int stage = n % kStages;
      const uint32_t to = ptx::shared_address(shared.rows[stage] + row * kPitch) + 16 * quarter;
      const uint64_t codes = reinterpret_cast<uint64_t>(records->nope + index * kNope) + 16 * quarter;
      const uint64_t rope = reinterpret_cast<uint64_t>(records->rope + index * kRope) + 16 * quarter;
#pragma unroll
      for (int i = 0; i < kNope / 64; ++i) ptx::copy_16(to + 64 * i, codes + 64 * i, found >= 0);
#pragma unroll
      for (int i = 0; i < 2; ++i) ptx::copy_16(to + kNope + 64 * i, rope + 64 * i, found >= 0);
      if (quarter == 0) {
        constexpr int kBytes = kGroups ? 8 : 4;
        const uint64_t scale = reinterpret_cast<uint64_t>(records->scale) + index * kBytes;
        ptx::copy_small<kBytes>(ptx::shared_address(&shared.scale[stage][row]), scale, found >= 0);
      }
      seen = __ballot_sync(0xFFFFFFFFu, found >= 0);
    }
    ptx::copies_commit();
    look_up();
    look(n + 2);
    return seen;
  }
};

// This thread's part of the queries, from `from` (heads, 512), in the form of a warp's fragments: warp w takes heads w
// and w + 8, a lane four times eight values of one.
template <typename T>
struct Queries {
  uint4 stored[4][sizeof(T) / 2];

  __device__ __forceinline__ void load(const T* from, int heads) {
    const int lane = threadIdx.x % 32, head = threadIdx.x / 32 + 8 * (lane / 16);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int part = 0; part < static_cast<int>(sizeof(T) / 2); ++part) {
        const uint4* at = reinterpret_cast<const uint4*>(from + head * kWidth + 128 * i + 8 * (lane % 16)) + part;
        stored[i][part] = head < heads ? __ldg(at) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  __device__ __forceinline__ float value(int i, int v) const {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(word_of(stored[i][v / 4], v % 4));
    } else {
      const uint32_t pair = word_of(stored[i][0], v / 2);
      return __uint_as_float(v % 2 ? pair & 0xFFFF0000u : pair << 16);
    }
  }

  // Normed and rotated where they come raw, as float16; the RoPE half as two terms in bfloat16.
  template <bool kGroups>
  __device__ __forceinline__ void store(const AttendCall& call, SharedMemory<kGroups>& shared, int64_t t) const {
    const int lane = threadIdx.x % 32, part = lane % 16;
    float norm = 1.0f;
    if (call.cos) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int v = 0; v < 8; ++v) squares = fmaf(value(i, v), value(i, v), squares);
      }
#pragma unroll
      for (int step = 8; step; step /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
      norm = rsqrtf(squares / kWidth + call.eps);
    }
    // Of a lane's 16 bytes for 16 values of the inner index, the first eight are of heads 0 to 7.
    uint2* to = reinterpret_cast<uint2*>(&shared.q[0][0]) + 2 * (4 * (threadIdx.x / 32) + part % 8 / 2) + lane / 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int chunk = 2 * i + part / 8;
      float x[8];
#pragma unroll
      for (int v = 0; v < 8; ++v) x[v] = value(i, v) * norm;
      const bool rope = i == 3 && chunk == kChunks;
      if (rope && call.cos) {
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const int64_t at = t * (kRope / 2) + 4 * (part - 8) + pair;
          const float c = __ldg(call.cos + at), s = __ldg(call.sin + at), a = x[2 * pair], b = x[2 * pair + 1];
          x[2 * pair] = a * c - b * s, x[2 * pair + 1] = a * s + b * c;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float* y = x + 4 * half;
        uint2* at = to + 64 * (4 * chunk + 2 * (part % 2) + half);
        if (!rope) {
          *at = make_uint2(ptx::half_pair(y[0], y[1]), ptx::half_pair(y[2], y[3]));
        } else {
          const uint2 high = make_uint2(ptx::bfloat_pair(y[0], y[1]), ptx::bfloat_pair(y[2], y[3]));
          *at = high;
          at[64 * 4] = make_uint2(
              ptx::bfloat_pair(y[0] - __uint_as_float(high.x << 16), y[1] - __uint_as_float(high.x & 0xFFFF0000u)),
              ptx::bfloat_pair(y[2] - __uint_as_float(high.y << 16), y[3] - __uint_as_float(high.y & 0xFFFF0000u)));
        }
      }
    }
  }
};

// The largest of a row's scales and, relative to it, that of every 64 values.
__device__ __forceinline__ float unpack_scales(SharedMemory<true>& shared, uint64_t stored, int buffer, int row) {
  return dsv4::unpack_scales<kChunks>(stored, [&](int i, uint16_t factor) { shared.factor[buffer][i][row] = factor; });
}

// A warp's fragments of the queries. Every warp needs all of them for every block of rows: where there are several
// blocks they are held in registers, as reading them from shared memory takes as long as the products.
template <bool kGroups, bool kHeld>
struct QueryFragments {
  const SharedMemory<kGroups>& shared;
  uint4 held[kHeld ? 4 * kChunks + 8 : 1];

  __device__ __forceinline__ QueryFragments(const SharedMemory<kGroups>& shared, bool two_parts) : shared(shared) {
    if constexpr (kHeld) {
#pragma unroll
      for (int step = 0; step < 4 * kChunks + (two_parts ? 8 : 4); ++step) held[step] = read(step);
    }
  }
  __device__ __forceinline__ uint4 read(int step) const {
    const uint4 a = shared.q[step][threadIdx.x % 32];
    return make_uint4(a.x, a.z, a.y, a.w);
  }
  __device__ __forceinline__ uint4 operator[](int step) const {
    if constexpr (kHeld) return held[step];
    return read(step);
  }
};

// A warp's eight rows times 16 heads: columns 2 quarter and the next of heads g, then of g + 8. Codes and RoPE half
// apart.
template <bool kGroups, bool kHeld>
__device__ __forceinline__ void score_rows(const QueryFragments<kGroups, kHeld>& q, const uint8_t* row,
                                           const uint16_t* factor, bool two_parts, float (&nope)[4], float (&rope)[4]) {
  const int quarter = threadIdx.x % 4;
  float sums[4][4] = {}, ropes[2][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const uint4 codes = *reinterpret_cast<const uint4*>(row + 64 * chunk + 16 * quarter);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t b0, b1;
      ptx::halves_of_e4m3(word_of(codes, step), &b0, &b1);
      if constexpr (kGroups) {
        const uint32_t by = factor[chunk * kRows] * 0x10001u;
        b0 = ptx::multiply_halves(b0, by), b1 = ptx::multiply_halves(b1, by);
      }
      ptx::product_of_warp(sums[step], q[4 * chunk + step], b0, b1);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 values = *reinterpret_cast<const uint4*>(row + kNope + 32 * quarter + 16 * half);
    const int step = 4 * kChunks + 2 * half;
    ptx::product_of_warp_bf16(ropes[0], q[step], values.x, values.y);
    ptx::product_of_warp_bf16(ropes[1], q[step + 1], values.z, values.w);
    if (two_parts) {
      ptx::product_of_warp_bf16(ropes[0], q[step + 4], values.x, values.y);
      ptx::product_of_warp_bf16(ropes[1], q[step + 5], values.z, values.w);
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    nope[k] = (sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]);
    rope[k] = ropes[0][k] + ropes[1][k];
  }
}

// Adds a block's probabilities times 64 of its values: tile 4 j + v of `out` has values 32 j + 4 n + v of the codes,
// tile 2 j + v values 16 j + 2 n + v of the RoPE half, n = 0 to 7.
template <bool kGroups>
__device__ __forceinline__ void add_values(const SharedMemory<kGroups>& shared, const uint8_t* rows, int buffer,
                                           float (&out)[8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  const int low = row_of_column(2 * quarter), high = row_of_column(2 * quarter + 1);
#pragma unroll 2
  for (int step = 0; step < kRows / 16; ++step) {
    const uint8_t* from = rows + (16 * step + low) * kPitch + 64 * warp + 4 * g;
    const int apart = (high - low) * kPitch;
    const auto load = [&](int offset, uint32_t (&words)[4]) {
      words[0] = *reinterpret_cast<const uint32_t*>(from + offset);
      words[1] = *reinterpret_cast<const uint32_t*>(from + offset + apart);
      words[2] = *reinterpret_cast<const uint32_t*>(from + offset + 8 * kPitch);
      words[3] = *reinterpret_cast<const uint32_t*>(from + offset + 8 * kPitch + apart);
    };
    uint32_t words[4];
    if (warp < kChunks) {
      const uint4 a = shared.p[0][step][lane];
      uint32_t factors[2] = {};
      if constexpr (kGroups) {
        const uint16_t* factor = &shared.factor[buffer][warp][16 * step];
        factors[0] = factor[low] | static_cast<uint32_t>(factor[high]) << 16;
        factors[1] = factor[8 + low] | static_cast<uint32_t>(factor[8 + high]) << 16;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        load(32 * j, words);
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {  // of values
          const uint32_t select = pair ? 0x7362 : 0x5140;
          const uint32_t first = __byte_perm(words[0], words[1], select),
                         second = __byte_perm(words[2], words[3], select);
          uint32_t b0[2], b1[2];
          ptx::halves_of_e4m3(first, &b0[0], &b0[1]);
          ptx::halves_of_e4m3(second, &b1[0], &b1[1]);
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            if constexpr (kGroups) {
              b0[v] = ptx::multiply_halves(b0[v], factors[0]), b1[v] = ptx::multiply_halves(b1[v], factors[1]);
            }
            ptx::product_of_warp(out[4 * j + 2 * pair + v], a, b0[v], b1[v]);
          }
        }
      }
    } else {
      const uint4 a = shared.p[1][step][lane];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        load(32 * j, words);
        ptx::product_of_warp_bf16(out[2 * j], a, __byte_perm(words[0], words[1], 0x5410),
                                  __byte_perm(words[2], words[3], 0x5410));
        ptx::product_of_warp_bf16(out[2 * j + 1], a, __byte_perm(words[0], words[1], 0x7632),
                                  __byte_perm(words[2], words[3], 0x7632));
      }
    }
  }
}

// Four values of a head: rotated back where queries came raw, and stored.
template <bool kFloat, bool kGroups>
__device__ __forceinline__ void store_four(const AttendCall& call, const SharedMemory<kGroups>& shared, int64_t head,
                                           int value, float4 x) {
  if (call.cos && value >= kNope) {
    const float2 c = *reinterpret_cast<const float2*>(&shared.turn[0][(value - kNope) / 2]);
    const float2 s = *reinterpret_cast<const float2*>(&shared.turn[1][(value - kNope) / 2]);
    x = make_float4(x.x * c.x + x.y * s.x, x.y * c.x - x.x * s.x, x.z * c.y + x.w * s.y, x.w * c.y - x.z * s.y);
  }
  const int64_t at = head * kWidth + value;
  if constexpr (kFloat) {
    *reinterpret_cast<float4*>(static_cast<float*>(call.out) + at) = x;
  } else {
    *reinterpret_cast<uint2*>(static_cast<BFloat16*>(call.out) + at) =
        make_uint2(ptx::bfloat_pair(x.x, x.y), ptx::bfloat_pair(x.z, x.w));
  }
}

template <bool kGroups, bool kFloat, bool kHeld>
__global__ void __launch_bounds__(kThreads, 1)
    attend_kernel(const __grid_constant__ AttendCall call, const __grid_constant__ Divisors divide) {
  extern __shared__ __align__(16) uint8_t raw[];
  SharedMemory<kGroups>& shared = *reinterpret_cast<SharedMemory<kGroups>*>(raw);
  using T = std::conditional_t<kFloat, float, BFloat16>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  const int64_t t = blockIdx.z;
  const int first_head = blockIdx.y * kHeads, heads = min(kHeads, static_cast<int>(call.heads) - first_head);
  const int splits = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);

  Queries<T> queries;
  queries.load(static_cast<const T*>(call.q) + (t * call.heads + first_head) * kWidth, heads);
  const Token token = token_of(call, divide, t);
  float sinks[2];  // of heads g and g + 8, as `total` and `top`
#pragma unroll
  for (int h = 0; h < 2; ++h) sinks[h] = g + 8 * h < heads ? __ldg(call.sink + first_head + g + 8 * h) : 0.0f;
  if (!token.blocks) {  // padding, the same in the whole cluster
    constexpr int kVectors = kWidth * sizeof(T) / 16;
    uint4* to = static_cast<uint4*>(call.out) + (t * call.heads + first_head) * kVectors;
    for (int i = threadIdx.x + rank * kThreads; i < heads * kVectors; i += kThreads * splits)
      to[i] = make_uint4(0, 0, 0, 0);
    return;
  }
  ptx::cluster_arrive();  // others may send when all are here

  const int first = token.blocks * rank / splits, blocks = token.blocks * (rank + 1) / splits - first;
  Fetcher<kGroups> fetcher{call, divide, token, shared, t, first, blocks, 8 * warp + g, quarter};
  fetcher.step(-2);
  fetcher.step(-1);
  uint32_t seen = fetcher.step(0), seen_next = fetcher.step(1);
  if (call.cos && threadIdx.x < kRope) {
    const int pair = threadIdx.x % (kRope / 2);
    shared.turn[threadIdx.x / (kRope / 2)][pair] =
        __ldg((threadIdx.x < kRope / 2 ? call.cos : call.sin) + t * (kRope / 2) + pair);
  }
  queries.store(call, shared, t);
  __syncthreads();
  const bool two_parts = kFloat || call.cos;
  const QueryFragments<kGroups, kHeld> fragments(shared, two_parts);

  const int rows_of[2] = {8 * warp + row_of_column(2 * quarter), 8 * warp + row_of_column(2 * quarter + 1)};
  const float factor = call.scale * kLog2e;
  float out[8][4] = {}, total[2] = {}, top[2] = {-INFINITY, -INFINITY};
  for (int i = 0; i < blocks; ++i) {
    const int stage = i % kStages, buffer = i & 1;
    ptx::copies_wait<1>();
    __syncwarp();
    float scales[2];
    if constexpr (kGroups) {
      float largest = 0.0f;
      if (lane < 8) largest = unpack_scales(shared, shared.scale[stage][8 * warp + lane], buffer, 8 * warp + lane);
      __syncwarp();
#pragma unroll
      for (int c = 0; c < 2; ++c) scales[c] = __shfl_sync(0xFFFFFFFFu, largest, rows_of[c] - 8 * warp);
    } else {
#pragma unroll
      for (int c = 0; c < 2; ++c) scales[c] = shared.scale[stage][rows_of[c]];
    }
    // Scores, relative to nothing, in powers of 2: of heads g and g + 8, two rows each.
    float scores[2][2];
    {
      float nope[4], rope[4];
      const int row = 8 * warp + row_of_column(g);
      const uint16_t* factors = kGroups ? &shared.factor[buffer % (kGroups ? 2 : 1)][0][row] : nullptr;
      score_rows(fragments, shared.rows[stage] + row * kPitch, factors, two_parts, nope, rope);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const bool sees = seen >> (4 * (rows_of[k % 2] - 8 * warp)) & 1;
        scores[k / 2][k % 2] = sees ? factor * fmaf(scales[k % 2], nope[k], rope[k]) : -INFINITY;
      }
    }
    // The reference of a head: the largest score times scale so far.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float most = fmaxf(scores[h][0] + ptx::log2_fast(fmaxf(scales[0], 1e-30f)),
                         scores[h][1] + ptx::log2_fast(fmaxf(scales[1], 1e-30f)));
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
      most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
      if (quarter == 0) shared.most[g + 8 * h][warp] = most;
    }
    __syncthreads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4* most = reinterpret_cast<const float4*>(shared.most[g + 8 * h]);
      const float4 a = most[0], b = most[1];
      const float before = top[h];
      top[h] = fmaxf(fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w))), before);
      const float reference = top[h] == -INFINITY ? 0.0f : top[h], alpha = ptx::exp2_fast(before - reference);
      const float p0 = ptx::exp2_fast(scores[h][0] - reference), p1 = ptx::exp2_fast(scores[h][1] - reference);
      total[h] = fmaf(total[h], alpha, p0 + p1);
      // Words of heads g, then of g + 8, of the first eight rows of 16, then of the others.
      const int word = 2 * (warp & 1) + h;
      reinterpret_cast<uint32_t*>(&shared.p[0][warp / 2][lane])[word] = ptx::half_pair(p0 * scales[0], p1 * scales[1]);
      reinterpret_cast<uint32_t*>(&shared.p[1][warp / 2][lane])[word] = ptx::bfloat_pair(p0, p1);
#pragma unroll
      for (int tile = 0; tile < 8; ++tile) out[tile][2 * h] *= alpha, out[tile][2 * h + 1] *= alpha;
    }
    __syncthreads();
    add_values(shared, shared.rows[stage], buffer, out);
    seen = seen_next;
    seen_next = fetcher.step(i + 2);
  }

  // Sums, in the order of warps, then of thread blocks.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 1);
    total[h] += __shfl_xor_sync(0xFFFFFFFFu, total[h], 2);
    if (quarter == 0) shared.sum[g + 8 * h][warp] = total[h];
    if (threadIdx.x < 32 && quarter == 0) shared.top[g + 8 * h] = top[h];
  }
  __syncthreads();
  ptx::cluster_wait();
  if (threadIdx.x < splits * kHeads) {
    const int head = threadIdx.x % kHeads;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += shared.sum[head][w];
    ptx::store_remote(ptx::address_in(ptx::shared_address(&shared.softmax[rank][head]), threadIdx.x / kHeads),
                      shared.top[head], sum);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const int unit = 4 * warp + k, h = k / 2, j = k % 2;
    const uint32_t to =
        ptx::address_in(ptx::shared_address(&shared.parts[unit / splits * splits + rank][0][lane]), unit % splits);
    // Four values side by side, and four more.
    const bool codes = warp < kChunks;
    const float4 a =
        make_float4(out[4 * j][2 * h], out[4 * j + 1][2 * h], codes ? out[4 * j + 2][2 * h] : out[4 * j][2 * h + 1],
                    codes ? out[4 * j + 3][2 * h] : out[4 * j + 1][2 * h + 1]);
    const float4 b = make_float4(codes ? out[4 * j][2 * h + 1] : out[4 * j + 2][2 * h],
                                 codes ? out[4 * j + 1][2 * h + 1] : out[4 * j + 3][2 * h], out[4 * j + 2][2 * h + 1],
                                 out[4 * j + 3][2 * h + 1]);
    ptx::store_remote(to, a);
    ptx::store_remote(to + 32 * sizeof(float4), b);
  }
  ptx::cluster_arrive();
  ptx::cluster_wait();
  for (int unit = rank + splits * warp; unit < kUnits; unit += splits * kWarps) {
    const int h = unit / 2 % 2, head = g + 8 * h;
    float most = -INFINITY;
    for (int r = 0; r < splits; ++r) most = fmaxf(most, shared.softmax[r][head].x);
    const float reference = most == -INFINITY ? 0.0f : most;
    float sum = 0.0f;
    float4 a = {}, b = {};
    for (int r = 0; r < splits; ++r) {
      const float2 part = shared.softmax[r][head];
      // A part without a maximum has sums of 0, or of NaN.
      const float weight = ptx::exp2_fast((part.x == -INFINITY ? reference : part.x) - reference);
      const float4 x = shared.parts[unit / splits * splits + r][0][lane],
                   y = shared.parts[unit / splits * splits + r][1][lane];
      sum = fmaf(weight, part.y, sum);
      a.x = fmaf(weight, x.x, a.x), a.y = fmaf(weight, x.y, a.y), a.z = fmaf(weight, x.z, a.z),
      a.w = fmaf(weight, x.w, a.w);
      b.x = fmaf(weight, y.x, b.x), b.y = fmaf(weight, y.y, b.y), b.z = fmaf(weight, y.z, b.z),
      b.w = fmaf(weight, y.w, b.w);
    }
    if (head >= heads) continue;
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / (sum + ptx::exp2_fast(sinks[h] * kLog2e - reference));
    const bool codes = unit / 4 < kChunks;
    const int value = 64 * (unit / 4) + 32 * (unit % 2) + (codes ? 8 : 4) * quarter;
    a.x *= inverse, a.y *= inverse, a.z *= inverse, a.w *= inverse;
    b.x *= inverse, b.y *= inverse, b.z *= inverse, b.w *= inverse;
    store_four<kFloat>(call, shared, t * call.heads + first_head + head, value, a);
    store_four<kFloat>(call, shared, t * call.heads + first_head + head, value + (codes ? 4 : 16), b);
  }
}

}  // namespace dsv4::attend_few

#endif  // DSV4_ATTEND_FEW_TOKENS_CUH_
