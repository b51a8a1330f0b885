// Scores of the visible entries on Hopper: FP4 keys in registers against queries in shared memory.
//
// A warpgroup takes 64 keys at a time. A quarter of a key, 16 bytes, is one thread's, and is a fragment of operand A
// once its codes are halves: the order of the inner index is free, so the query is stored in the order in which a word's
// nibbles come apart (see `inner`). The products with 64 heads are rounded to halves, negative ones to 0, and are
// operand A once more, against the heads' weights. A score depends on its token and key alone.
#ifndef DSV4_SELECT_SCORES_CUH_
#define DSV4_SELECT_SCORES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "select/op.h"

namespace dsv4::select_sm90 {

constexpr int kWidth = 128, kHeads = 64;
constexpr int kTile = 64;     // keys of a warpgroup's products
constexpr int kGroup = 16;    // keys whose best score is kept beside the scores: a warp's
constexpr int kWarpgroups = 2, kThreads = kWarpgroups * 128;
constexpr int kAcross = kHeads * 16;                   // bytes from 8 of the inner index to the next 8
constexpr int kQueryBytes = kHeads * kWidth * 2;       // a token's query
constexpr int kWeightBytes = kHeads * 8 * 2;           // its weights: 8 columns, of which two are used
constexpr int kTokenBytes = kQueryBytes + kWeightBytes + 16;  // and the factor of its scores

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void products_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t address, uint32_t across) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | static_cast<uint64_t>(across >> 4) << 16 |
         static_cast<uint64_t>(128 >> 4) << 32;
}

// d (64 keys, 64 heads) = or += a b over 16 of the inner index.
__device__ __forceinline__ void product(float (&d)[32], const uint32_t* a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
      "%23, %24, %25, %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
        "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
        "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
        "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}
// d (64 keys, 8) = or += a b over 16 heads.
__device__ __forceinline__ void product_8(float (&d)[4], const uint32_t* a, uint64_t b, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %9, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, add, 1, 1, 0;\n}\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ __forceinline__ uint32_t multiply_halves(uint32_t a, uint32_t b) {
  uint32_t product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
// max(x, 0) as halves; NaN stays NaN.
__device__ __forceinline__ uint32_t positive_halves(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// A float's bits, or 0 where a score is not one, as an integer that orders as scores do: NaN is the best, -0 is 0.
__device__ __forceinline__ uint32_t order_of(float score) {
  if (score != score) return 0xFFFFFFFFu;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// E2M1 codes of a word, times 2^-14, as the high bytes of halves: those at odd places; after a shift by 4 the even ones.
__device__ __forceinline__ uint32_t high_bytes(uint32_t codes) {
  return (codes & 0x80808080u) | ((codes >> 3) & 0x0E0E0E0Eu);
}

// The 8 codes of a word times `scale` (twice, as halves): what it holds of two steps of 16 of the inner index.
__device__ __forceinline__ void decode_word(uint32_t codes, uint32_t scale, uint32_t* first, uint32_t* second) {
  const uint32_t odd = high_bytes(codes), even = high_bytes(codes << 4);
  first[0] = multiply_halves((even << 8) & 0xFF00FF00u, scale);   // codes 0, 4
  first[2] = multiply_halves((odd << 8) & 0xFF00FF00u, scale);    // codes 1, 5
  second[0] = multiply_halves(even & 0xFF00FF00u, scale);         // codes 2, 6
  second[2] = multiply_halves(odd & 0xFF00FF00u, scale);          // codes 3, 7
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
    uint32_t halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(scales)));
    halves = multiply_halves(halves, 0x58005800u);  // times 2^7: products are times 2^-7
    low = __byte_perm(halves, 0, 0x1010), high = __byte_perm(halves, 0, 0x3232);
    *factor = 1.0f;
  }
  decode_word(codes.x, low, a, a + 4);
  decode_word(codes.y, low, a + 8, a + 12);
  decode_word(codes.z, high, a + 16, a + 20);
  decode_word(codes.w, high, a + 24, a + 28);
}

// Loads 16 consecutive values of q.
__device__ __forceinline__ void load_values(const void* q, bool is_float, int64_t at, float (&x)[16]) {
  if (is_float) {
    const auto* from = reinterpret_cast<const float4*>(static_cast<const float*>(q) + at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 four = from[i];
      x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
  } else {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(q) + at);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 eight = from[i];
      const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[8 * i + 2 * j] = __uint_as_float(words[j] << 16);
        x[8 * i + 2 * j + 1] = __uint_as_float(words[j] & 0xFFFF0000u);
      }
    }
  }
}

// A token's query into `out` as halves: rotated by RoPE (with call.cos) and by Hadamard, each head times the power of
// two that brings its largest value into [4, 8); and its weights, with what makes up for those powers. Eight lanes a
// head, 16 values a lane. All threads of the block.
__device__ __forceinline__ void prepare_query(const SelectCall& call, int64_t token, char* out) {
  auto* weights = reinterpret_cast<float*>(out + kQueryBytes);  // as floats first, where the halves will be
  for (int task = threadIdx.x; task < kHeads * 8; task += kThreads) {
    const int head = task / 8, lane = task % 8;
    float x[16] = {};
    const bool live = head < call.heads;
    if (live) {
      load_values(call.q, call.is_float, (token * call.heads + head) * kWidth + 16 * lane, x);
      const int from = kWidth - 2 * static_cast<int>(call.pairs);
#pragma unroll
      for (int i = 0; i < 16; i += 2) {
        const int pair = (16 * lane + i - from) / 2;
        if (16 * lane + i < from || !call.cos) continue;
        const float cos = call.cos[token * call.pairs + pair], sin = call.sin[token * call.pairs + pair];
        const float even = x[i] * cos - x[i + 1] * sin, odd = x[i] * sin + x[i + 1] * cos;
        x[i] = call.is_float ? even : __bfloat162float(__float2bfloat16_rn(even));
        x[i + 1] = call.is_float ? odd : __bfloat162float(__float2bfloat16_rn(odd));
      }
    }
#pragma unroll
    for (int stride = 1; stride < 16; stride *= 2) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        if (i & stride) continue;
        const float a = x[i], b = x[i + stride];
        x[i] = a + b, x[i + stride] = a - b;
      }
    }
#pragma unroll
    for (int stride = 1; stride < 8; stride *= 2) {
      const bool second = lane & stride;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, x[i], stride);
        x[i] = second ? other - x[i] : x[i] + other;
      }
    }
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) most = max(most, __float_as_uint(x[i]) & 0x7FFFFFFFu);
#pragma unroll
    for (int stride = 1; stride < 8; stride *= 2) most = max(most, __shfl_xor_sync(0xFFFFFFFFu, most, stride));
    const uint32_t exponent = max(most >> 23, 3u);
    const float factor = exponent == 255 ? __uint_as_float(0x7FC00000u) : __uint_as_float((256 - exponent) << 23);
    char* to = out + 2 * (lane & 1) * 4 * kAcross + head / 8 * 128 + head % 8 * 16 + 4 * (lane >> 1);
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if (i & 4) continue;
      *reinterpret_cast<__half2*>(to + (4 * (i >> 3) + (i & 3)) * kAcross) =
          __floats2half2_rn(x[i] * factor, x[i + 4] * factor);
    }
    if (lane == 0) {
      weights[head] = live ? call.weights[token * call.heads + head] * __uint_as_float((exponent - 2) << 23) : 0.0f;
    }
  }
  __syncthreads();
  float w = 0.0f;
  uint32_t most = 0;
  if (threadIdx.x < kHeads) {
    w = weights[threadIdx.x];
    const float other = weights[threadIdx.x ^ 32];
    most = __reduce_max_sync(0xFFFFFFFFu, max(__float_as_uint(w) & 0x7FFFFFFFu, __float_as_uint(other) & 0x7FFFFFFFu));
  }
  __syncthreads();
  if (threadIdx.x < kHeads) {
    // The largest into [256, 512); in two terms, of which the second is below the first's rounding.
    const uint32_t exponent = max(most >> 23, 9u);
    w *= exponent == 255 ? __uint_as_float(0x7FC00000u) : __uint_as_float((262 - exponent) << 23);
    const __half high = __float2half_rn(w), low = __float2half_rn(w - __half2float(high));
    auto* to = reinterpret_cast<__half*>(out + kQueryBytes + threadIdx.x / 8 * 128 + threadIdx.x % 8 * 2);
#pragma unroll
    for (int n = 0; n < 8; ++n) to[8 * n] = n == 0 ? high : n == 1 ? low : __half(0.0f);
    if (threadIdx.x == 0) {
      *reinterpret_cast<float*>(out + kQueryBytes + kWeightBytes) =
          exponent == 255 ? __uint_as_float(0x7FC00000u) : __uint_as_float((exponent - 8) << 23);
    }
  }
}

struct Piece {
  int64_t first, count;  // tokens
  int per_block;         // of which a thread block takes so many
  int shift;             // log2 of call.per_block, -1 where it is no power of two
};

// Scores of a piece's tokens as integers that order as they do, 0 where a token sees no entry; for every kGroup of them
// the largest. A thread block takes some tokens, and its share of the keys that they see; consecutive tokens of a slot
// share what is read. For tokens that see at most k entries nothing happens.
template <bool kPowers>
__global__ void __launch_bounds__(kThreads, 2) score_kernel(SelectCall call, Piece piece) {
  extern __shared__ __align__(1024) char shared[];
  __shared__ int32_t seen[16];
  asm volatile("griddepcontrol.launch_dependents;");  // the next kernel may start, and wait
  const int64_t first = piece.first + static_cast<int64_t>(blockIdx.y) * piece.per_block;
  const int count = static_cast<int>(min(static_cast<int64_t>(piece.per_block), piece.first + piece.count - first));
  if (threadIdx.x < count) seen[threadIdx.x] = call.visible(first + threadIdx.x);
  __syncthreads();
  for (int t = 0; t < count; ++t) {
    if (seen[t] > call.k) prepare_query(call, first + t, shared + t * kTokenBytes);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();

  const int warp = threadIdx.x / 32 % 4, row = threadIdx.x % 32 / 4, quarter = threadIdx.x % 4;
  const auto num_rows = static_cast<int32_t>(call.num_blocks);
  for (int t = 0; t < count;) {
    const int32_t slot = call.slots[first + t];
    int end = t, most = 0;
    for (; end < count && call.slots[first + end] == slot; ++end) most = max(most, seen[end]);
    if (most <= call.k) {
      t = end;
      continue;
    }
    const int tiles = (most + kTile - 1) / kTile;
    const int last = static_cast<int>(static_cast<int64_t>(tiles) * (blockIdx.x + 1) / gridDim.x);
    const int32_t* table = call.table + slot * call.columns;

    // The pool's row of an entry, -1: none.
    const auto find = [&](int32_t entry) {
      if (entry >= most) return -1;
      const auto per_block = static_cast<int32_t>(call.per_block);
      const int32_t column = piece.shift >= 0 ? entry >> piece.shift : entry / per_block;
      const int32_t block = table[column];
      return block < 0 || block >= num_rows ? -1 : block * per_block + (entry - column * per_block);
    };
    int32_t rows[2], rows_after[2];
    uint4 codes[2];
    uint32_t scales[2];
    const auto look = [&](int tile, int32_t (&to)[2]) {
      const int32_t entry = tile * kTile + warp * kGroup + row;
      to[0] = tile < last ? find(entry) : -1, to[1] = tile < last ? find(entry + 8) : -1;
    };
    const auto fetch = [&](const int32_t (&from)[2]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (from[i] >= 0) {
          codes[i] = __ldg(reinterpret_cast<const uint4*>(call.keys) + static_cast<int64_t>(from[i]) * 4 + quarter);
          if constexpr (kPowers) {
            scales[i] = __ldg(reinterpret_cast<const uint32_t*>(call.scale) + from[i]);
          } else {
            scales[i] = __ldg(reinterpret_cast<const uint16_t*>(call.scale) + static_cast<int64_t>(from[i]) * 4 + quarter);
          }
        } else {
          codes[i] = uint4{}, scales[i] = 0;
        }
      }
    };
    int tile = static_cast<int>(static_cast<int64_t>(tiles) * blockIdx.x / gridDim.x) + threadIdx.x / 128;
    look(tile, rows);
    fetch(rows);
    look(tile + kWarpgroups, rows_after);
    for (; tile < last; tile += kWarpgroups) {
      uint32_t a[32];
      float factors[2];
      // a[4 s + i]: step s, register i of a fragment; the second row's are one further.
      decode_quarter<kPowers>(codes[0], scales[0], quarter, a, &factors[0]);
      decode_quarter<kPowers>(codes[1], scales[1], quarter, a + 1, &factors[1]);
      const bool live[2] = {rows[0] >= 0, rows[1] >= 0};
      rows[0] = rows_after[0], rows[1] = rows_after[1];
      fetch(rows);
      look(tile + 2 * kWarpgroups, rows_after);
      const int32_t entry = tile * kTile + warp * kGroup + row;
      for (int u = t; u < end; ++u) {
        if (seen[u] <= call.k || tile * kTile >= seen[u]) continue;
        const char* token = shared + u * kTokenBytes;
        float d[32];
        const uint64_t b = tile_descriptor(shared_address(token), kAcross);
        products_fence();
#pragma unroll
        for (int step = 0; step < 8; ++step) product(d, a + 4 * step, b + step * (2 * kAcross >> 4), step > 0);
        products_commit();
        products_wait();
        uint32_t relu[16];
#pragma unroll
        for (int i = 0; i < 16; ++i) relu[i] = positive_halves(d[2 * i], d[2 * i + 1]);
        float sums[4];
        const uint64_t w = tile_descriptor(shared_address(token) + kQueryBytes, 128);
        products_fence();
#pragma unroll
        for (int step = 0; step < 4; ++step) product_8(sums, relu + 4 * step, w + step * (256 >> 4), step > 0);
        products_commit();
        products_wait();
        const float factor = *reinterpret_cast<const float*>(token + kQueryBytes + kWeightBytes);
        uint32_t order[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const bool is_seen = quarter == 0 && live[i] && entry + 8 * i < seen[u];
          const float scale = kPowers ? factors[i] * 0x1p-7f : 1.0f;
          order[i] = is_seen ? order_of((sums[2 * i] + sums[2 * i + 1]) * factor * scale) : 0;
        }
        uint32_t* to = call.scratch + (first + u - piece.first) * call.scratch_row;
        const uint32_t best = __reduce_max_sync(0xFFFFFFFFu, max(order[0], order[1]));
        if (quarter == 0) to[entry] = order[0], to[entry + 8] = order[1];
        if (threadIdx.x % 32 == 0) to[call.scratch_row / (kGroup + 1) * kGroup + entry / kGroup] = best;
      }
    }
    t = end;
  }
}

}  // namespace dsv4::select_sm90

#endif  // DSV4_SELECT_SCORES_CUH_
