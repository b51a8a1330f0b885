// RMSNorm and RoPE of a vector that is spread over threads: in the order of operations of math/rms_norm_rope.h, so that
// the results are the same bits on the host.
#ifndef DSV4_CUDA_RMS_NORM_ROPE_CUH_
#define DSV4_CUDA_RMS_NORM_ROPE_CUH_

#include <cuda_runtime.h>

#include "cuda/geometry.cuh"
#include "cuda/ptx.cuh"
#include "cuda/values.cuh"
#include "formats/float_math.h"

namespace dsv4 {

// Adds neighbouring pairs until one sum is left.
template <int kSums>
__device__ __forceinline__ float add_pairs(const float (&x)[kSums]) {
  if constexpr (kSums == 1) {
    return x[0];
  } else {
    float sums[(kSums + 1) / 2];
#pragma unroll
    for (int i = 0; i < kSums / 2; ++i) sums[i] = x[2 * i] + x[2 * i + 1];
    if constexpr (kSums % 2) sums[kSums / 2] = x[kSums - 1];
    return add_pairs(sums);
  }
}

template <typename Layout>
__device__ __forceinline__ void sync_threads_of() {
  if constexpr (Layout::kThreads == 32) {
    __syncwarp();
  } else if constexpr (Layout::kBarrier == 0) {
    __syncthreads();
  } else {
    ptx::sync_threads(Layout::kBarrier, Layout::kThreads);
  }
}

// What a thread needs of the weights and of a position's rotation; loaded before it is needed. The last kRope channels
// of the vector are rotated in pairs of neighbours.
template <typename Layout, int kRope, Load kLoad>
class SpreadRmsNormRope {
  static constexpr int kDim = Layout::kDim, kNope = kDim - kRope;
  static constexpr int kVector = Layout::kVector, kPieces = Layout::kPieces, kWarps = Layout::kWarps;
  static_assert(kNope % kVector == 0, "a piece is rotated or not");

 public:
  // Memory that the threads share; free again when the next barrier after a call is passed.
  using Scratch = float[kWarps * kPieces];

  // weight (kDim); cosines and sines (kRope / 2) of the position.
  __device__ __forceinline__ void load(const float* weight, const float* cosines, const float* sines, int thread) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) weight_[p].load(weight + Layout::channel(p, thread));
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!rotates(p, thread)) continue;
      const int pair = (Layout::channel(p, thread) - kNope) / 2;
      cos_[p].load(cosines + pair);
      sin_[p].load(sines + pair);
    }
  }

  // All threads of the layout call together; with one warp the scratch is not used.
  __device__ __forceinline__ void operator()(float (&v)[kPieces][kVector], float eps, int thread,
                                             float* scratch) const {
    float squares[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) squares[p] = sum_of_squares(v[p]);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p) squares[p] += __shfl_xor_sync(0xFFFFFFFFu, squares[p], step);
    }
    const float scale = inverse_sqrt(mean(sum_of_warps(squares, thread, scratch)) + eps);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) v[p][i] = v[p][i] * scale * weight_[p][i];
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (!rotates(p, thread)) continue;
#pragma unroll
      for (int i = 0; i < kVector / 2; ++i) {
        const float even = v[p][2 * i], odd = v[p][2 * i + 1];
        v[p][2 * i] = even * cos_[p][i] - odd * sin_[p][i];
        v[p][2 * i + 1] = even * sin_[p][i] + odd * cos_[p][i];
      }
    }
  }

 private:
  static __device__ __forceinline__ bool rotates(int piece, int thread) {
    return Layout::channel(piece, Layout::kThreads) > kNope && Layout::channel(piece, thread) >= kNope;
  }
  static __device__ __forceinline__ float sum_of_squares(const float (&x)[kVector]) {
    float squares[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) squares[i] = x[i] * x[i];
    return add_pairs(squares);
  }
  static __device__ __forceinline__ float sum_of_warps(const float (&squares)[kPieces], int thread, float* scratch) {
    if constexpr (kWarps == 1) {
      return add_pairs(squares);
    } else {
      if (thread % 32 == 0) {
#pragma unroll
        for (int p = 0; p < kPieces; ++p) scratch[p * kWarps + thread / 32] = squares[p];
      }
      sync_threads_of<Layout>();
      float sums[kPieces * kWarps];
#pragma unroll
      for (int i = 0; i < kPieces * kWarps; ++i) sums[i] = scratch[i];
      return add_pairs(sums);
    }
  }
  static __device__ __forceinline__ float mean(float sum) {
    if constexpr ((kDim & (kDim - 1)) == 0) return sum * (1.0f / kDim);  // exact
    return divide(sum, static_cast<float>(kDim));
  }

  Values<float, kVector, kLoad> weight_[kPieces];
  Values<float, kVector / 2, kLoad> cos_[kPieces], sin_[kPieces];
};

}  // namespace dsv4

#endif  // DSV4_CUDA_RMS_NORM_ROPE_CUH_
