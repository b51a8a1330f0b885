// The product of a few tokens with 16 or 32 rows of a bfloat16 weight, by a thread block whose warps each have an
// eighth of the columns. The order in which a product runs over its columns is free: a thread takes 16 contiguous bytes
// of a row of the weight, and of x, as operands of two products, and so copies to shared memory what it alone will
// read.
#ifndef DSV4_DENSE_PRODUCT_CUH_
#define DSV4_DENSE_PRODUCT_CUH_

#include <cuda_bf16.h>

#include "cuda/ptx.cuh"

namespace dsv4::dense {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kStep = 32;  // columns of two products

// kPlaces: tokens by 8; kTiles: rows by 16; kAhead: steps whose weights are under way.
template <int kPlaces, int kTiles, int kAhead>
constexpr int shared_bytes() {
  constexpr int kRing = kAhead * (kTiles * 2 + kPlaces) * kThreads * 16, kSums = kWarps * 8 * kPlaces * 16 * kTiles * 4;
  return kRing > kSums ? kRing : kSums;
}

// Calls before_stores(), then store(token, row, sum) for each of the block's. `rows`: the first of them, `from`:
// (tokens, columns).
template <int kPlaces, int kTiles, int kAhead, typename Store, typename Before>
__device__ __forceinline__ void multiply_rows(const __nv_bfloat16* rows, const __nv_bfloat16* from, int tokens,
                                              int columns, uint8_t* shared, const Store& store,
                                              const Before& before_stores) {
  constexpr int kOfStep = 2 * kTiles + kPlaces;                  // pieces of a thread
  uint4* ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;  // (ahead, tiles by halves and tokens, threads)
  float* sums = reinterpret_cast<float*>(shared);                // (warps, tokens, rows), afterwards
  constexpr int kRows = 16 * kTiles, kTokens = 8 * kPlaces;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const int slice = columns / kWarps, pitch = columns / 8, steps = slice / kStep;
  const uint4* w = reinterpret_cast<const uint4*>(rows + static_cast<int64_t>(g) * columns + warp * slice) + c;
  const uint4* x = reinterpret_cast<const uint4*>(from + static_cast<int64_t>(g) * columns + warp * slice) + c;
  const auto copy = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        ptx::copy_16(ptx::shared_address(ring + (step % kAhead * kOfStep + i) * kThreads),
                     w + step * (kStep / 8) + i * 8 * pitch);
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        if (p * 8 + g < tokens)
          ptx::copy_16(ptx::shared_address(ring + (step % kAhead * kOfStep + 2 * kTiles + p) * kThreads),
                       x + step * (kStep / 8) + p * 8 * pitch);
      }
    }
    ptx::copies_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kAhead - 1; ++step) copy(step);
  float sum[kTiles][kPlaces][4] = {};
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    copy(step + kAhead - 1);
    ptx::copies_wait<kAhead - 1>();
    const uint4* own = ring + step % kAhead * kOfStep * kThreads;
    uint4 b[kPlaces];
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
      b[p] = make_uint4(0, 0, 0, 0);
      if (p * 8 + g < tokens) b[p] = own[(2 * kTiles + p) * kThreads];
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 q = own[2 * t * kThreads], r = own[(2 * t + 1) * kThreads];
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        ptx::product_of_warp_bf16(sum[t][p], make_uint4(q.x, r.x, q.y, r.y), b[p].x, b[p].y);
        ptx::product_of_warp_bf16(sum[t][p], make_uint4(q.z, r.z, q.w, r.w), b[p].z, b[p].w);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * kTokens + p * 8 + c * 2 + i % 2) * kRows + t * 16 + i / 2 * 8 + g] = sum[t][p][i];
    }
  }
  __syncthreads();
  before_stores();
  for (int i = threadIdx.x; i < tokens * kRows; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int of_warp = 0; of_warp < kWarps; ++of_warp) total += sums[of_warp * kTokens * kRows + i];
    store(i / kRows, i % kRows, total);
  }
}

}  // namespace dsv4::dense

#endif  // DSV4_DENSE_PRODUCT_CUH_
