// Stored weights as operands of the tensor cores, and what streams them through shared memory (sm_90).
//
// A weight's codes are converted in registers, exactly, to half precision, times a power of two relative to the largest
// scale of the row's part, so that any scales fit. The order in which a product runs over its inner index is free: a
// thread takes 16 contiguous bytes of a row, and activations are put into the same order.
#ifndef DSV4_CUDA_WEIGHT_MMA_CUH_
#define DSV4_CUDA_WEIGHT_MMA_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace dsv4 {

__device__ __forceinline__ uint32_t largest_byte(const uint4& bytes) {
  uint32_t m = __vmaxu4(__vmaxu4(bytes.x, bytes.y), __vmaxu4(bytes.z, bytes.w));
  m = __vmaxu4(m, m >> 16);
  return max(m & 0xFFu, (m >> 8) & 0xFFu);
}

// Packed pairs of bfloat16: the larger magnitudes' bits.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t a, uint32_t b) { return __vmaxu2(a, b & 0x7FFF7FFFu); }

// The power of two that brings values up to a magnitude (the bits of a bfloat16) well into the range of halves.
__device__ __forceinline__ float into_halves(uint32_t magnitude) {
  const int exponent = magnitude >> 7;
  return __uint_as_float(static_cast<uint32_t>(exponent == 255 ? 127 : min(265 - exponent, 253)) << 23);
}
__device__ __forceinline__ float inverse_power(float power) {
  return __uint_as_float((254u << 23) - __float_as_uint(power));
}

}  // namespace dsv4

#endif  // DSV4_CUDA_WEIGHT_MMA_CUH_
