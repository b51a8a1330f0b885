// Products of stored weights with many tokens: wgmma, weights converted in registers, no copy of them anywhere.
//
// Activations come packed (pack_kernel): halves, each row times a power of two of its own, in the order in which
// threads hold weights. A warpgroup has two tiles of 64 weight rows and adds up both for up to kTokens tokens.
#ifndef DSV4_CUDA_WEIGHT_PRODUCT_CUH_
#define DSV4_CUDA_WEIGHT_PRODUCT_CUH_

#include <cuda_bf16.h>

#include "cuda/weight_mma.cuh"
#include "cuda/wgmma.cuh"

namespace dsv4 {

enum class Codes { kE2M1, kE4M3 };

constexpr int kChunk = 128;  // columns of a stage
constexpr int kProductThreads = 256;
constexpr int kProductStages = 4;

// Where column e of 128 goes in packed activations.
template <Codes kCodes>
__device__ __forceinline__ int packed_place(int e) {
  if (kCodes == Codes::kE2M1) {
    const int c = e / 32, i = e % 32 / 8, r = e % 8;
    return (i * 2 + r % 2) * 16 + 2 * c + r / 2 % 2 + r / 4 * 8;
  }
  const int u = e / 64, c = e % 64 / 16, i = e % 16 / 4, r = e % 4;
  return (u * 4 + i) * 16 + 2 * c + r % 2 + r / 2 * 8;
}

// A block a row: x (rows, columns) bfloat16 -> packed, and what products with it are to be multiplied by.
template <Codes kCodes>
__global__ void __launch_bounds__(256)
    pack_kernel(const __nv_bfloat16* x, int columns, __half* packed, float* inverse) {
  __shared__ uint32_t largest_of[8];
  const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(blockIdx.x) * columns);
  uint32_t largest = 0;
  for (int i = threadIdx.x; i < columns / 8; i += 256) {
    const uint4 v = from[i];
    largest = larger_magnitudes(larger_magnitudes(largest, v.x), v.y);
    largest = larger_magnitudes(larger_magnitudes(largest, v.z), v.w);
  }
  largest = max(largest & 0xFFFFu, largest >> 16);
  for (int d = 1; d < 32; d *= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, d));
  if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < 8; ++i) largest = max(largest, largest_of[i]);
  const float power = into_halves(largest);
  if (threadIdx.x == 0) inverse[blockIdx.x] = inverse_power(power);
  __half* to = packed + static_cast<int64_t>(blockIdx.x) * columns;
  for (int i = threadIdx.x; i < columns / 8; i += 256) {
    const uint4 v = from[i];
    uint32_t* row = reinterpret_cast<uint32_t*>(to + i / 16 * kChunk);
    const int e = i % 16 * 8;
    const auto low = [power](uint32_t p) { return __uint_as_float(p << 16) * power; };
    const auto high = [power](uint32_t p) { return __uint_as_float(p & 0xFFFF0000u) * power; };
    if (kCodes == Codes::kE2M1) {
      const uint4 o = halves_in_order(v, power);
      row[packed_place<kCodes>(e) / 2] = o.x, row[packed_place<kCodes>(e + 4) / 2] = o.y;
      row[packed_place<kCodes>(e + 1) / 2] = o.z, row[packed_place<kCodes>(e + 5) / 2] = o.w;
    } else {
      row[packed_place<kCodes>(e) / 2] = ptx::half_pair(low(v.x), high(v.x));
      row[packed_place<kCodes>(e + 2) / 2] = ptx::half_pair(low(v.y), high(v.y));
      row[packed_place<kCodes>(e + 4) / 2] = ptx::half_pair(low(v.z), high(v.z));
      row[packed_place<kCodes>(e + 6) / 2] = ptx::half_pair(low(v.w), high(v.w));
    }
  }
}

// A tile of 64 weight rows, as a thread sees it: rows r and r + 8 of its warp's 16.
template <Codes kCodes>
struct WeightTile {
  static constexpr int kWords = kCodes == Codes::kE2M1 ? 4 : 8;  // of a row's chunk, in a thread
  const uint8_t* codes[2];
  const uint8_t* scale[2];
  uint32_t largest[2];

  // first_chunk … last_chunk: what is going to be multiplied.
  __device__ void init(const uint8_t* all_codes, const uint8_t* all_scale, int64_t first_row, int columns,
                       int first_chunk, int last_chunk) {
    const int lane = threadIdx.x % 32, c = lane % 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + threadIdx.x % 128 / 32 * 16 + lane / 4 + h * 8;
      largest[h] = 0;
      if (kCodes == Codes::kE2M1) {
        codes[h] = all_codes + row * (columns / 2) + first_chunk * 64 + c * 16;
        scale[h] = all_scale + row * (columns / 32) + first_chunk * 4 + c;
        const uint4* of_row = reinterpret_cast<const uint4*>(scale[h] - c);
        for (int i = c; i < (last_chunk - first_chunk) / 4; i += 4)
          largest[h] = max(largest[h], largest_byte(of_row[i]));
        largest[h] = max(largest[h], __shfl_xor_sync(0xFFFFFFFFu, largest[h], 1));
        largest[h] = max(largest[h], __shfl_xor_sync(0xFFFFFFFFu, largest[h], 2));
      } else {
        codes[h] = all_codes + row * columns + first_chunk * 128 + c * 16;
        scale[h] = all_scale + row / 128 * (columns / 128) + first_chunk;
        for (int i = first_chunk; i < last_chunk; ++i) {
          largest[h] = max(largest[h], static_cast<uint32_t>(__ldg(scale[h] + i - first_chunk)));
        }
      }
    }
  }
  __device__ __forceinline__ void load(int chunk, uint32_t (&q)[2][kWords], uint32_t (&s)[2]) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int i = 0; i < kWords / 4; ++i) {
        const uint4 v = __ldg(reinterpret_cast<const uint4*>(codes[h] + chunk * (kWords * 16) + i * 64));
        q[h][4 * i] = v.x, q[h][4 * i + 1] = v.y, q[h][4 * i + 2] = v.z, q[h][4 * i + 3] = v.w;
      }
      s[h] = __ldg(scale[h] + chunk * (kCodes == Codes::kE2M1 ? 4 : 1));
    }
  }
  __device__ __forceinline__ uint32_t scale_halves(int h, uint32_t s) const {
    if (kCodes == Codes::kE2M1) return relative_scale(s, largest[h]);
    return static_cast<uint32_t>(max(static_cast<int>(s) - static_cast<int>(largest[h]) + 15, 0)) * 0x04000400u;
  }
  __device__ __forceinline__ float factor(int h) const {
    return kCodes == Codes::kE2M1 ? largest_scale(largest[h]) : __uint_as_float(largest[h] << 23);
  }
  // The two products' operands that part i of 4 of a chunk holds.
  __device__ __forceinline__ static void convert(const uint32_t (&q)[2][kWords], const uint32_t (&s)[2], int i,
                                                 uint32_t (&a)[8]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if constexpr (kCodes == Codes::kE2M1) {
        uint32_t x[4];
        halves_of_e2m1(q[h][i], s[h], x);
        a[h] = x[0], a[2 + h] = x[1], a[4 + h] = x[2], a[6 + h] = x[3];
      } else {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint32_t word = q[h][2 * i + w];
          a[4 * w + h] = ptx::multiply_halves(ptx::halves_of_e4m3(word), s[h]);
          a[4 * w + 2 + h] = ptx::multiply_halves(ptx::halves_of_e4m3(word >> 16), s[h]);
        }
      }
    }
  }
};

// E2M1 weights go through shared memory on their way to registers: each thread its own, 64 bytes and 4 words of scales.
constexpr int kWeightStage = kProductThreads * (64 + 16);

template <Codes kCodes, int kTokens>
constexpr int kProductShared = kProductStages * (kTokens * kChunk * 2 + (kCodes == Codes::kE2M1 ? kWeightStage : 0));

// sum[t] += tile t times the tokens, over chunks of columns. rows: of the packed activations, -1: none; in shared
// memory. `packed` begins at the first chunk.
template <Codes kCodes, int kTokens>
__device__ __forceinline__ void multiply_tiles(const WeightTile<kCodes> (&tiles)[2], const __half* packed, int columns,
                                               int chunks, const int* rows, uint8_t* shared,
                                               float (&sum)[2][kTokens / 2]) {
  constexpr int kStageBytes = kTokens * kChunk * 2, kAhead = kProductStages - 2;
  constexpr bool kThroughShared = kCodes == Codes::kE2M1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t own_weights = ptx::shared_address(shared) + kProductStages * kStageBytes + threadIdx.x * 16;
  const uint32_t own_scales =
      ptx::shared_address(shared) + kProductStages * kStageBytes + kProductThreads * 64 + threadIdx.x * 4;
  const auto fetch = [&](int chunk) {
    if (chunk < chunks) {
      const uint32_t stage = ptx::shared_address(shared) + chunk % kProductStages * kStageBytes;
#pragma unroll
      for (int m = 0; m < kTokens / 16; ++m) {
        const int task = m * 8 + warp, token = task % (kTokens / 8) * 8 + lane % 8;
        const int unit = task / (kTokens / 8) * 4 + lane / 8;
        const int row = rows[token];
        const __half* from = packed + static_cast<int64_t>(max(row, 0)) * columns + chunk * kChunk + unit * 8;
        ptx::copy_16(stage + (unit * kTokens + token) * 16, reinterpret_cast<uint64_t>(from), row >= 0);
      }
    }
    if (kThroughShared && chunk < chunks) {
      const uint32_t own = own_weights + chunk % kProductStages * kWeightStage;
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          ptx::copy_16(own + (t * 2 + h) * kProductThreads * 16, tiles[t].codes[h] + chunk * 64);
          ptx::copy_small<4>(own_scales + chunk % kProductStages * kWeightStage + (t * 2 + h) * kProductThreads * 4,
                             tiles[t].scale[h] - lane % 4 + chunk * 4);
        }
      }
    }
    ptx::copies_commit();
  };
  using Tile = WeightTile<kCodes>;
  uint32_t next[2][2][Tile::kWords], next_scale[2][2];
  if (!kThroughShared) {
#pragma unroll
    for (int t = 0; t < 2; ++t) tiles[t].load(0, next[t], next_scale[t]);
  }
  for (int i = 0; i < kAhead; ++i) fetch(i);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[t][i] = 0.0f;
  }
  uint32_t a[2][8];
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t q[2][2][Tile::kWords], s[2][2];
    if (!kThroughShared) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          s[t][h] = tiles[t].scale_halves(h, next_scale[t][h]);
#pragma unroll
          for (int i = 0; i < Tile::kWords; ++i) q[t][h][i] = next[t][h][i];
        }
        tiles[t].load(min(chunk + 1, chunks - 1), next[t], next_scale[t]);
      }
    }
    ptx::copies_wait<kAhead - 1>();
    ptx::fence_shared_proxy();
    if (kThroughShared) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t four;
          asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                       : "=r"(q[t][h][0]), "=r"(q[t][h][1]), "=r"(q[t][h][2]), "=r"(q[t][h][3])
                       : "r"(own_weights + chunk % kProductStages * kWeightStage + (t * 2 + h) * kProductThreads * 16)
                       : "memory");
          asm volatile("ld.shared.b32 %0, [%1];"
                       : "=r"(four)
                       : "r"(own_scales + chunk % kProductStages * kWeightStage + (t * 2 + h) * kProductThreads * 4)
                       : "memory");
          s[t][h] = tiles[t].scale_halves(h, __byte_perm(four, 0, 0x4440 + lane % 4));
        }
      }
    }
    __syncthreads();
    fetch(chunk + kAhead);
    const uint32_t stage = ptx::shared_address(shared) + chunk % kProductStages * kStageBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        ptx::products_wait<1>();  // what used these registers two steps ago is done
        Tile::convert(q[t], s[t], i, a[t]);
        ptx::products_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          wgmma<kTokens>(sum[t], a[t] + 4 * step,
                         ptx::piece_descriptor(stage + (2 * i + step) * 2 * kTokens * 16, kTokens * 16));
        }
        ptx::products_commit();
      }
    }
  }
  ptx::products_wait<0>();
  ptx::copies_wait<0>();
  __syncthreads();
}

}  // namespace dsv4

#endif  // DSV4_CUDA_WEIGHT_PRODUCT_CUH_
