// Products of E4M3 weights with many tokens: wgmma, weights converted in registers, no copy of them anywhere.
//
// Activations come packed (pack_kernel): halves, each row times a power of two of its own, in the order in which
// threads hold weights. A warpgroup has two tiles of 64 weight rows and adds up both for up to kTokens tokens.
#ifndef DSV4_CUDA_WEIGHT_PRODUCT_CUH_
#define DSV4_CUDA_WEIGHT_PRODUCT_CUH_

#include <cuda_bf16.h>

#include "cuda/weight_mma.cuh"
#include "cuda/wgmma.cuh"

namespace dsv4 {

constexpr int kChunk = 128;  // columns of a stage
constexpr int kProductThreads = 256;
constexpr int kProductStages = 4;

// Where column e of 128 goes in packed activations.
__device__ __forceinline__ int packed_place(int e) {
  const int u = e / 64, c = e % 64 / 16, i = e % 16 / 4, r = e % 4;
  return (u * 4 + i) * 16 + 2 * c + r % 2 + r / 2 * 8;
}

// A block a row: x (rows, columns) bfloat16 -> packed, and what products with it are to be multiplied by.
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
    row[packed_place(e) / 2] = ptx::half_pair(low(v.x), high(v.x));
    row[packed_place(e + 2) / 2] = ptx::half_pair(low(v.y), high(v.y));
    row[packed_place(e + 4) / 2] = ptx::half_pair(low(v.z), high(v.z));
    row[packed_place(e + 6) / 2] = ptx::half_pair(low(v.w), high(v.w));
  }
}

// A tile of 64 weight rows, as a thread sees it: rows r and r + 8 of its warp's 16.
struct WeightTile {
  static constexpr int kWords = 8;  // of a row's chunk, in a thread
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
      codes[h] = all_codes + row * columns + first_chunk * 128 + c * 16;
      scale[h] = all_scale + row / 128 * (columns / 128) + first_chunk;
      for (int i = first_chunk; i < last_chunk; ++i)
        largest[h] = max(largest[h], static_cast<uint32_t>(__ldg(scale[h] + i - first_chunk)));
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
      s[h] = __ldg(scale[h] + chunk);
    }
  }
  __device__ __forceinline__ uint32_t scale_halves(int h, uint32_t s) const {
    return static_cast<uint32_t>(max(static_cast<int>(s) - static_cast<int>(largest[h]) + 15, 0)) * 0x04000400u;
  }
  __device__ __forceinline__ float factor(int h) const { return __uint_as_float(largest[h] << 23); }
  // The two products' operands that part i of 4 of a chunk holds.
  __device__ __forceinline__ static void convert(const uint32_t (&q)[2][kWords], const uint32_t (&s)[2], int i,
                                                 uint32_t (&a)[8]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < 2; ++w) {
        uint32_t low, high;
        ptx::halves_of_e4m3(q[h][2 * i + w], &low, &high);
        a[4 * w + h] = ptx::multiply_halves(low, s[h]), a[4 * w + 2 + h] = ptx::multiply_halves(high, s[h]);
      }
    }
  }
};

template <int kTokens>
constexpr int kProductShared = kProductStages * kTokens * kChunk * 2;

// sum[t] += tile t times the tokens, over chunks of columns. rows: of the packed activations, -1: none; in shared
// memory. `packed` begins at the first chunk.
template <int kTokens>
__device__ __forceinline__ void multiply_tiles(const WeightTile (&tiles)[2], const __half* packed, int columns,
                                               int chunks, const int* rows, uint8_t* shared,
                                               float (&sum)[2][kTokens / 2]) {
  constexpr int kStageBytes = kTokens * kChunk * 2, kAhead = kProductStages - 2;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
    ptx::copies_commit();
  };
  using Tile = WeightTile;
  uint32_t next[2][2][Tile::kWords], next_scale[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) tiles[t].load(0, next[t], next_scale[t]);
  for (int i = 0; i < kAhead; ++i) fetch(i);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[t][i] = 0.0f;
  }
  uint32_t a[2][8];
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t q[2][2][Tile::kWords], s[2][2];
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
    ptx::copies_wait<kAhead - 1>();
    ptx::fence_shared_proxy();
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
