// Activations as sums of two E4M3 values: v = high + low, exactly for bfloat16 within 2^9 of a row's largest value, to
// 2^-17 of that value below, and to 2^-10 for halves. Weights are E4M3 already, or nearly (E2M1), and meet them on the
// tensor cores without a rounding.
#ifndef DSV4_CUDA_SPLIT_E4M3_CUH_
#define DSV4_CUDA_SPLIT_E4M3_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace dsv4 {

__device__ __forceinline__ float2 floats_of(uint32_t pair, __nv_bfloat16) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
__device__ __forceinline__ float2 floats_of(uint32_t pair, __half) {
  __half2 h;
  memcpy(&h, &pair, 4);
  return __half22float2(h);
}

// The power of two that brings values up to a magnitude to at most 256; NaN if that is not finite.
__device__ __forceinline__ float into_e4m3(float largest) {
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  if (exponent == 255) return __uint_as_float(0x7FC00000u);
  return __uint_as_float(static_cast<uint32_t>(min(261 - static_cast<int>(exponent), 253)) << 23);
}

__device__ __forceinline__ float2 floats_of_e4m3(uint32_t codes) {
  return floats_of(ptx::halves_of_e4m3(codes), __half());
}
// Four values, already in range, as codes of their high and low parts.
__device__ __forceinline__ uint2 split_four(float a, float b, float c, float d) {
  const uint32_t first = ptx::e4m3_pair(a, b), second = ptx::e4m3_pair(c, d);
  const float2 p = floats_of_e4m3(first), q = floats_of_e4m3(second);
  const uint32_t low_first = ptx::e4m3_pair(a - p.x, b - p.y), low_second = ptx::e4m3_pair(c - q.x, d - q.y);
  return make_uint2(first | second << 16, low_first | low_second << 16);
}

}  // namespace dsv4

#endif  // DSV4_CUDA_SPLIT_E4M3_CUH_
