// Scores of the visible entries on Hopper: FP4 keys in registers against queries in shared memory.
//
// A warpgroup takes 64 keys at a time. A quarter of a key, 16 bytes, is one thread's, and is a fragment of operand A
// once its codes are halves: the order of the inner index is free, so the query is stored in the order in which a
// word's nibbles come apart (see `inner`). The products with 64 heads are rounded to halves, negative ones to 0, and
// are operand A once more, against the heads' weights (of a product of the warp). A score depends on its token and key
// alone.
#ifndef DSV4_SELECT_SCORES_CUH_
#define DSV4_SELECT_SCORES_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "select/op.h"

namespace dsv4::select_sm90 {

constexpr int kWidth = 128, kHeads = 64;
constexpr int kTile = 64;                         // keys of a warpgroup's products
constexpr int kGroup = 16;                        // keys whose best score is kept beside the scores: a warp's
constexpr int kThreads = 256;                     // of a thread block, or twice as many
constexpr int kAcross = kHeads * 16;              // bytes from 8 of the inner index to the next 8
constexpr int kQueryBytes = kHeads * kWidth * 2;  // a token's query
constexpr int kWeightBytes = 32 * 8 * 4;          // its weights, as a warp's registers have them
constexpr int kTokenBytes = kQueryBytes + kWeightBytes + 16;  // and the factor of its scores

// An integer that orders as scores do, above 0: NaN, of which arithmetic makes but one, is the best. No score is -0.
__device__ __forceinline__ uint32_t order_of(float score) {
  const uint32_t bits = __float_as_uint(score);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

// Keeps the compiler from computing an address anew wherever it is used.
template <typename T>
__device__ __forceinline__ T* fixed(T* p) {
  asm volatile("" : "+l"(p));
  return p;
}

// E2M1 codes of a word, times 2^-14, as the high bytes of halves: those at odd places; after a shift by 4 the even
// ones.
__device__ __forceinline__ uint32_t high_bytes(uint32_t codes) {
  return (codes & 0x80808080u) | ((codes >> 3) & 0x0E0E0E0Eu);
}

// The 8 codes of a word times `scale` (twice, as halves): what it holds of two steps of 16 of the inner index.
__device__ __forceinline__ void decode_word(uint32_t codes, uint32_t scale, uint32_t* first, uint32_t* second) {
  const uint32_t odd = high_bytes(codes), even = high_bytes(codes << 4);
  first[0] = ptx::multiply_halves(__byte_perm(even, 0, 0x2404), scale);  // codes 0, 4
  first[2] = ptx::multiply_halves(__byte_perm(odd, 0, 0x2404), scale);   // codes 1, 5
  second[0] = ptx::multiply_halves(even & 0xFF00FF00u, scale);           // codes 2, 6
  second[2] = ptx::multiply_halves(odd & 0xFF00FF00u, scale);            // codes 3, 7
}

// A quarter of a key: the scales of its codes and, for powers of two, the factor of the whole key.
template <bool kPowers>
__device__ __forceinline__ void decode_quarter(uint4 codes, uint32_t scales, int quarter, uint32_t* a, float* factor) {
  uint32_t low, high;  // of its first and second 16 codes
  if constexpr (kPowers) {
    // Relative to the largest, below 2^-23 of which a group is lost to float32 sums too.
    const int last = scales >> 24, third = scales >> 16 & 0xFF, second = scales >> 8 & 0xFF, first = scales & 0xFF;
    const int most = max(max(first, second), max(third, last));
    const int mine = scales >> 8 * quarter & 0xFF;
    const int exponent = mine - most + 29;  // of 2^14 times it, as a half's bits
    low = mine == 0xFF ? 0x7E00u : exponent < 6 ? 0u : static_cast<uint32_t>(exponent) << 10;
    low |= low << 16, high = low;
    *factor = __uint_as_float(static_cast<uint32_t>(most) << 23);
  } else {
    const uint32_t halves =
        ptx::multiply_halves(ptx::halves_of_e4m3(scales), 0x58005800u);  // times 2^7: products are times 2^-7
    low = __byte_perm(halves, 0, 0x1010), high = __byte_perm(halves, 0, 0x3232);
    *factor = 1.0f;
  }
  decode_word(codes.x, low, a, a + 4);
  decode_word(codes.y, low, a + 8, a + 12);
  decode_word(codes.z, high, a + 16, a + 20);
  decode_word(codes.w, high, a + 24, a + 28);
}

// 16 consecutive values of q, as stored.
struct Values {
  uint4 words[4];  // of bfloat16 the first two

  __device__ __forceinline__ void load(const SelectCall& call, int64_t at) {
    if (call.is_float) {
      const auto* from = reinterpret_cast<const uint4*>(static_cast<const float*>(call.q) + at);
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = __ldg(from + i);
    } else {
      const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(call.q) + at);
      words[0] = __ldg(from), words[1] = __ldg(from + 1);
    }
  }

  __device__ __forceinline__ void floats(bool is_float, float (&x)[16]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 four = words[i], pairs = words[i / 2];
      const uint32_t low = i % 2 ? pairs.z : pairs.x, high = i % 2 ? pairs.w : pairs.y;
      x[4 * i] = __uint_as_float(is_float ? four.x : low << 16);
      x[4 * i + 1] = __uint_as_float(is_float ? four.y : low & 0xFFFF0000u);
      x[4 * i + 2] = __uint_as_float(is_float ? four.z : high << 16);
      x[4 * i + 3] = __uint_as_float(is_float ? four.w : high & 0xFFFF0000u);
    }
  }
};

// Prepares a token's query: into shared memory as halves, rotated by RoPE (with call.cos) and by Hadamard, each head
// times the power of two that brings its largest value into [4, 8); and its weights, with what makes up for those
// powers, as floats. Eight lanes a head, 16 values a lane, kEachHeads heads a thread. First everything is loaded.
template <int kBlock = kThreads>
struct Query {
  static constexpr int kEachHeads = kHeads * 8 / kBlock;
  Values values[kEachHeads];
  float4 cos[2], sin[2];  // of the last 64 values, which half the lanes have
  float weights[kEachHeads];

  __device__ __forceinline__ void load(const SelectCall& call, int64_t token) {
    const int lane = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kEachHeads; ++i) {
      const int head = threadIdx.x / 8 + i * kBlock / 8;
      weights[i] = 0.0f;
      values[i] = Values{};
      if (head >= call.heads) continue;
      values[i].load(call, (token * call.heads + head) * kWidth + 16 * lane);
      weights[i] = __ldg(call.weights + token * call.heads + head);
    }
    if (call.cos && lane >= 4) {
      const int64_t at = token * 8 + 2 * (lane - 4);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        cos[i] = __ldg(reinterpret_cast<const float4*>(call.cos) + at + i);
        sin[i] = __ldg(reinterpret_cast<const float4*>(call.sin) + at + i);
      }
    } else {
      cos[0] = cos[1] = make_float4(1.0f, 1.0f, 1.0f, 1.0f), sin[0] = sin[1] = float4{};
    }
  }

  __device__ __forceinline__ void store(bool is_float, char* out) const {
    const int lane = threadIdx.x % 8;
#pragma unroll
    for (int i = 0; i < kEachHeads; ++i) {
      const int head = threadIdx.x / 8 + i * kBlock / 8;
      float x[16];
      values[i].floats(is_float, x);
      const float c[8] = {cos[0].x, cos[0].y, cos[0].z, cos[0].w, cos[1].x, cos[1].y, cos[1].z, cos[1].w};
      const float s[8] = {sin[0].x, sin[0].y, sin[0].z, sin[0].w, sin[1].x, sin[1].y, sin[1].z, sin[1].w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float even = x[2 * j], odd = x[2 * j + 1];
        x[2 * j] = even * c[j] - odd * s[j], x[2 * j + 1] = even * s[j] + odd * c[j];
      }
#pragma unroll
      for (int stride = 1; stride < 16; stride *= 2) {
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          if (j & stride) continue;
          const float a = x[j], b = x[j + stride];
          x[j] = a + b, x[j + stride] = a - b;
        }
      }
#pragma unroll
      for (int stride = 1; stride < 8; stride *= 2) {
        const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < 16; ++j) x[j] = __shfl_xor_sync(0xFFFFFFFFu, x[j], stride) + sign * x[j];
      }
      uint32_t most = 0;
#pragma unroll
      for (int j = 0; j < 16; ++j) most = max(most, __float_as_uint(x[j]) & 0x7FFFFFFFu);
#pragma unroll
      for (int stride = 1; stride < 8; stride *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, stride));
      const uint32_t exponent = max(most >> 23, 3u);
      const float factor = __uint_as_float(exponent == 255 ? 0x7FC00000u : (256 - exponent) << 23);
      char* to = out + 2 * (lane & 1) * 4 * kAcross + head / 8 * 128 + head % 8 * 16 + 4 * (lane >> 1);
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        if (j & 4) continue;
        *reinterpret_cast<__half2*>(to + (4 * (j >> 3) + (j & 3)) * kAcross) =
            __floats2half2_rn(x[j] * factor, x[j + 4] * factor);
      }
      if (lane == 0) {
        reinterpret_cast<float*>(out + kQueryBytes)[head] = weights[i] * __uint_as_float((exponent - 2) << 23);
      }
    }
  }
};

// A token's weights as operand B of product_of_warp, times the power of two that brings the largest into [256, 512): in
// even columns, and in odd ones what their rounding left. Returns what a score is to be multiplied with.
__device__ __forceinline__ float take_weights(const float* weights, uint32_t (&b)[8]) {
  const int quarter = threadIdx.x % 4;
  float2 w[8];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    w[i] = reinterpret_cast<const float2*>(weights)[4 * i + quarter];
    most = max(most, max(__float_as_uint(w[i].x) & 0x7FFFFFFFu, __float_as_uint(w[i].y) & 0x7FFFFFFFu));
  }
  most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, 1));
  most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, 2));
  const uint32_t exponent = max(most >> 23, 9u);
  const float factor = __uint_as_float(exponent == 255 ? 0x7FC00000u : (262 - exponent) << 23);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float x = w[i].x * factor, y = w[i].y * factor;
    __half2 pair = __floats2half2_rn(x, y);
    if (threadIdx.x / 4 % 2) pair = __floats2half2_rn(x - __low2float(pair), y - __high2float(pair));
    b[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return __uint_as_float(exponent == 255 ? 0x7FC00000u : (exponent - 8) << 23);
}

struct Piece {
  int64_t first, count;  // tokens
  int shift;             // log2 of call.per_block
};

// A slot's keys, as the threads of a warpgroup take them.
template <bool kPowers>
struct Keys {
  const int32_t* table;        // of the slot
  const char *codes, *scales;  // what this thread takes of row 0
  const char* line;            // of row 0, what this lane asks the L2 cache for
  int32_t line_row;            // bytes from it to that of the next row; 0 if this lane asks for nothing
  int32_t entry;               // its first row of tile 0
  int32_t shift, num_blocks;

  __device__ __forceinline__ Keys(const SelectCall& call, const Piece& piece, int32_t slot) {
    const int row = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
    table = fixed(call.table + slot * call.columns);
    codes = fixed(reinterpret_cast<const char*>(call.keys) + 16 * quarter);
    scales = fixed(reinterpret_cast<const char*>(call.scale) + (kPowers ? 0 : 2 * quarter));
    // A warp's 16 keys are eight lines of codes and one of scales.
    const int lane = threadIdx.x % 32, of_scales = kPowers ? 4 : 8;
    line_row = lane < 8 ? 64 : lane == 8 ? of_scales : 0;
    line = lane < 8 ? reinterpret_cast<const char*>(call.keys) + 128 * lane : reinterpret_cast<const char*>(call.scale);
    line = fixed(line - row * line_row);
    entry = threadIdx.x / 32 % 4 * kGroup + row;
    num_blocks = static_cast<int32_t>(call.num_blocks), shift = piece.shift;
  }

  // The pool's row of this thread's first key of a tile, -1: none. A block has whole groups.
  __device__ __forceinline__ int32_t find(int tile, int last) const {
    if (tile >= last) return -1;
    const int32_t e = tile * kTile + entry, column = e >> shift;
    const int32_t block = __ldg(table + column);
    const int32_t row = ((block - column) << shift) + e;
    return static_cast<uint32_t>(block) < static_cast<uint32_t>(num_blocks) ? row : -1;
  }

  // Brings a warp's rows into the L2 cache; none for -1.
  __device__ __forceinline__ void ask_for(int32_t row) const {
    if (row >= 0 && line_row) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(line + static_cast<int64_t>(row) * line_row));
    }
  }

  uint4 code[2] = {};
  uint32_t scale[2] = {};

  // Loads two rows, this one and the one 8 further; none for -1. In one piece, which stays ahead of the products.
  __device__ __forceinline__ void fetch(int32_t row) {
    constexpr int kScales = kPowers ? 4 : 8;
    const char* from = codes + static_cast<int64_t>(row) * 64;
    const char* of = scales + static_cast<int64_t>(row) * kScales;
#define DSV4_FETCH(type)                                                                                               \
  asm volatile(                                                                                                        \
      "{\n.reg .pred given;\nsetp.ge.s32 given, %12, 0;\n"                                                             \
      "@given ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%10];\n@given ld.global.nc.v4.u32 {%4, %5, %6, %7}, [%10+512];\n" \
      "@given ld.global.nc." type " %8, [%11];\n@given ld.global.nc." type " %9, [%11+%13];\n}\n"                      \
      : "+r"(code[0].x), "+r"(code[0].y), "+r"(code[0].z), "+r"(code[0].w), "+r"(code[1].x), "+r"(code[1].y),          \
        "+r"(code[1].z), "+r"(code[1].w), "+r"(scale[0]), "+r"(scale[1])                                               \
      : "l"(from), "l"(of), "r"(row), "n"(8 * kScales))
    if constexpr (kPowers) {
      DSV4_FETCH("u32");
    } else {
      DSV4_FETCH("u16");
    }
#undef DSV4_FETCH
  }

  // As operand A, a[4 s + i]: step s, register i; and what the score of this lane's key is to be multiplied with.
  __device__ __forceinline__ float decode(uint32_t (&a)[32]) const {
    const int quarter = threadIdx.x % 4;
    float first, second;
    decode_quarter<kPowers>(code[0], scale[0], quarter, a, &first);
    decode_quarter<kPowers>(code[1], scale[1], quarter, a + 1, &second);
    return kPowers ? 0x1p-7f * (quarter % 2 ? second : first) : 1.0f;
  }
};

// The sum over heads, of the key of row lane / 4 for lanes of even quarters, of the one 8 further for odd ones.
__device__ __forceinline__ float score_of(const uint32_t (&a)[32], uint64_t query, const uint32_t* weights) {
  float d[32];
  ptx::products_fence();
#pragma unroll
  for (int step = 0; step < 8; ++step)
    ptx::product_f16<0>(d, a + 4 * step, query + step * (2 * kAcross >> 4), step > 0);
  ptx::products_commit();
  ptx::products_wait<0>();
  float sums[4] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t relu[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) relu[i] = ptx::positive_half_pair(d[8 * step + 2 * i], d[8 * step + 2 * i + 1]);
    ptx::product_of_warp(sums, relu, weights[2 * step], weights[2 * step + 1]);
  }
  return threadIdx.x % 2 ? sums[2] + sums[3] : sums[0] + sums[1];
}

__device__ __forceinline__ void store(uint32_t* to, uint32_t value) {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// Where the threads of a warpgroup put scores: those of a warp's keys of tile 0, and the best of them.
struct Place {
  uint32_t *scores, *best;

  __device__ __forceinline__ Place(const SelectCall& call, int64_t row) {
    uint32_t* to = call.scratch + row * call.scratch_row;
    const int warp = threadIdx.x / 32 % 4;
    scores = fixed(to + warp * kGroup + threadIdx.x % 32 / 4 + threadIdx.x % 2 * 8);
    best = fixed(to + call.scratch_row / (kGroup + 1) * kGroup + warp);
  }

  __device__ __forceinline__ void put(int tile, bool is_seen, float score) const {
    const uint32_t order = is_seen ? order_of(score) : 0;
    const uint32_t most = __reduce_max_sync(0xFFFFFFFFu, order);
    if (threadIdx.x % 4 < 2) store(scores + tile * kTile, order);
    if (threadIdx.x % 32 == 0) store(best + tile * (kTile / kGroup), most);
  }
};

__device__ __forceinline__ int share_of(int tiles, int block) {
  return static_cast<int>(static_cast<int64_t>(tiles) * block / gridDim.x);
}

// Scores of a piece's tokens, 0 where a token sees no entry; for every kGroup of them the largest. A thread block takes
// a token and its share of the keys that it sees. For a token that sees at most k entries nothing happens.
template <bool kPowers, int kBlock>
__global__ void __launch_bounds__(kBlock, 512 / kBlock) score_kernel(SelectCall call, Piece piece) {
  constexpr int kWarpgroups = kBlock / 128;
  extern __shared__ __align__(1024) char shared[];
  ptx::grid_launch_dependents();  // the next kernel may start, and wait
  const int64_t token = piece.first + blockIdx.y;
  const int32_t seen = call.visible(token);
  Query<kBlock> query;
  query.load(call, token);
  if (seen <= call.k) return;
  const int tiles = (seen + kTile - 1) / kTile, last = share_of(tiles, blockIdx.x + 1);
  int tile = share_of(tiles, blockIdx.x) + threadIdx.x / 128;
  Keys<kPowers> keys(call, piece, call.slots[token]);
  int32_t row = keys.find(tile, last), next_row = keys.find(tile + kWarpgroups, last);
  int32_t row_after = keys.find(tile + 2 * kWarpgroups, last);
  keys.fetch(row);
  keys.ask_for(next_row);
  query.store(call.is_float, shared);
  ptx::fence_shared_proxy();
  __syncthreads();
  uint32_t weights[8];
  const float factor = take_weights(reinterpret_cast<const float*>(shared + kQueryBytes), weights);
  const uint64_t b = ptx::piece_descriptor(ptx::shared_address(shared), kAcross);
  const Place place(call, blockIdx.y);
  const int32_t left = seen - keys.entry - threadIdx.x % 2 * 8;  // of this lane's keys those are seen below it
  for (; tile < last; tile += kWarpgroups) {
    uint32_t a[32];
    const Keys<kPowers> mine = keys;
    const bool given = row >= 0;
    row = next_row, next_row = row_after;
    keys.fetch(row);
    keys.ask_for(next_row);
    row_after = keys.find(tile + 3 * kWarpgroups, last);
    const float of_key = mine.decode(a);
    if (tile * kTile >= seen) break;  // never: ends a block of code, so that the loads above stay above the products
    const float score = score_of(a, b, weights);
    place.put(tile, given && tile * kTile < left, fmaf(score, kPowers ? factor * of_key : factor, 0.0f));
  }
}

// The same of kShared tokens a thread block: consecutive ones of a slot share what is read.
constexpr int kShared = 4;
template <bool kPowers>
__global__ void __launch_bounds__(kThreads, 2) shared_score_kernel(SelectCall call, Piece piece) {
  constexpr int kWarpgroups = kThreads / 128;
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t seen[kShared], slots[kShared];
  ptx::grid_launch_dependents();
  const int64_t first = piece.first + static_cast<int64_t>(blockIdx.y) * kShared, end = piece.first + piece.count;
  if (threadIdx.x < kShared) {
    const int64_t token = first + threadIdx.x;
    seen[threadIdx.x] = token < end ? call.visible(token) : 0;
    slots[threadIdx.x] = token < end ? call.slots[token] : -1;
    if (seen[threadIdx.x] <= call.k) seen[threadIdx.x] = 0;
  }
  for (int t = 0; t < kShared && first + t < end; ++t) {
    Query<> query;
    query.load(call, first + t);
    query.store(call.is_float, shared + t * kTokenBytes);
  }
  ptx::fence_shared_proxy();
  __syncthreads();
  // The weights as fragments, in the place of a token's floats.
  const int warp = threadIdx.x / 32;
  if (warp < kShared) {
    auto* place = reinterpret_cast<float*>(shared + warp * kTokenBytes + kQueryBytes);
    uint32_t b[8];
    const float factor = take_weights(place, b);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      reinterpret_cast<uint4*>(place)[2 * (threadIdx.x % 32) + i] =
          make_uint4(b[4 * i], b[4 * i + 1], b[4 * i + 2], b[4 * i + 3]);
    }
    if (threadIdx.x % 32 == 0) place[kWeightBytes / 4] = factor;
  }
  __syncthreads();
  for (int t = 0; t < kShared;) {
    int next = t, most = 0;
    for (; next < kShared && slots[next] == slots[t]; ++next) most = max(most, seen[next]);
    const int tiles = (most + kTile - 1) / kTile, last = share_of(tiles, blockIdx.x + 1);
    int tile = share_of(tiles, blockIdx.x) + threadIdx.x / 128;
    Keys<kPowers> keys(call, piece, most ? slots[t] : 0);
    int32_t row = keys.find(tile, last), next_row = keys.find(tile + kWarpgroups, last);
    keys.fetch(row);
    for (; tile < last; tile += kWarpgroups) {
      uint32_t a[32];
      const Keys<kPowers> mine = keys;
      const bool given = row >= 0;
      row = next_row;
      keys.fetch(row);
      next_row = keys.find(tile + 2 * kWarpgroups, last);
      const float of_key = mine.decode(a);
      const int32_t entry = tile * kTile + keys.entry + threadIdx.x % 2 * 8;
#pragma unroll
      for (int u = 0; u < kShared; ++u) {
        if (u < t || u >= next || tile * kTile >= seen[u]) continue;
        const char* of_token = shared + u * kTokenBytes;
        uint32_t weights[8];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint4 four = reinterpret_cast<const uint4*>(of_token + kQueryBytes)[2 * (threadIdx.x % 32) + i];
          weights[4 * i] = four.x, weights[4 * i + 1] = four.y, weights[4 * i + 2] = four.z,
                      weights[4 * i + 3] = four.w;
        }
        const float factor = *reinterpret_cast<const float*>(of_token + kQueryBytes + kWeightBytes);
        const float score = score_of(a, ptx::piece_descriptor(ptx::shared_address(of_token), kAcross), weights);
        const Place place(call, first + u - piece.first);
        place.put(tile, given && entry < seen[u], fmaf(score, kPowers ? factor * of_key : factor, 0.0f));
      }
    }
    t = next;
  }
}

}  // namespace dsv4::select_sm90

#endif  // DSV4_SELECT_SCORES_CUH_
