// Writing an FP4 key that lies in the registers of a warp, four neighbouring values a lane.
#ifndef DSV4_CUDA_KEY_WRITER_CUH_
#define DSV4_CUDA_KEY_WRITER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/geometry.cuh"
#include "formats/fp4.h"
#include "formats/key_rows.h"

namespace dsv4 {

template <typename Form>
class KeyWriter {
  static constexpr int kVector = 4;
  static_assert(Form::kDim == 32 * kVector, "four values a lane");

 public:
  // All 32 lanes call together.
  static __device__ __forceinline__ void write(const KeyRows& keys, int64_t row, float (&v)[kVector], int lane) {
    if (keys.rotate) rotate(v, lane);
    const bool is_nvfp4 = keys.group == 16;
    const int group_lanes = is_nvfp4 ? 16 / kVector : 32 / kVector;
    uint32_t amax =
        max(max(magnitude_bits(v[0]), magnitude_bits(v[1])), max(magnitude_bits(v[2]), magnitude_bits(v[3])));
    amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
    amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
    const uint32_t wider = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 4));
    if (!is_nvfp4) amax = wider;
    const GroupScale scale(amax, is_nvfp4);
    uint32_t codes = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) codes |= scale.encode(v[i]) << (4 * i);
    reinterpret_cast<uint16_t*>(keys.keys + row * (Form::kDim / 2))[lane] = static_cast<uint16_t>(codes);
    if (lane % group_lanes == 0) keys.scale[row * (32 / group_lanes) + lane / group_lanes] = scale.byte;
  }

 private:
  // By the orthonormal Hadamard matrix in natural order.
  static __device__ __forceinline__ void rotate(float (&v)[kVector], int lane) {
    const float a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    v[0] = a + c, v[1] = b + d, v[2] = a - c, v[3] = b - d;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float other = __shfl_xor_sync(0xFFFFFFFFu, v[i], step);
        v[i] = lane & step ? other - v[i] : v[i] + other;
      }
    }
    constexpr float kScale = 0x1.6a09e6p-4f;  // 1 / sqrt(128)
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] *= kScale;
  }
};

}  // namespace dsv4

#endif  // DSV4_CUDA_KEY_WRITER_CUH_
