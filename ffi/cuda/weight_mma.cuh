// Stored weights as operands of the tensor cores, and what streams them through shared memory (sm_90).
//
// A weight's codes are converted in registers, exactly, to half precision: E4M3 as they are, E2M1 times a power of two
// relative to the largest scale of the row's part, so that any scales fit. The order in which a product runs over its
// inner index is free: a thread takes 16 contiguous bytes of a row, and activations are put into the same order.
#ifndef DSV4_CUDA_WEIGHT_MMA_CUH_
#define DSV4_CUDA_WEIGHT_MMA_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace dsv4 {

// Eight E2M1 codes as halves times `scale` / 64, in the order (0, 2), (4, 6), (1, 3), (5, 7): as E4M3 codes first,
// which takes two operations on four values each.
__device__ __forceinline__ void halves_of_e2m1(uint32_t codes, uint32_t scale, uint32_t (&halves)[4]) {
  const uint32_t even = ((codes << 4) & 0x80808080u) | ((codes << 2) & 0x1C1C1C1Cu);
  const uint32_t odd = (codes & 0x80808080u) | ((codes >> 2) & 0x1C1C1C1Cu);
  halves[0] = ptx::multiply_halves(ptx::halves_of_e4m3(even), scale);
  halves[1] = ptx::multiply_halves(ptx::halves_of_e4m3(even >> 16), scale);
  halves[2] = ptx::multiply_halves(ptx::halves_of_e4m3(odd), scale);
  halves[3] = ptx::multiply_halves(ptx::halves_of_e4m3(odd >> 16), scale);
}

__device__ __forceinline__ uint32_t largest_byte(const uint4& bytes) {
  uint32_t m = __vmaxu4(__vmaxu4(bytes.x, bytes.y), __vmaxu4(bytes.z, bytes.w));
  m = __vmaxu4(m, m >> 16);
  return max(m & 0xFFu, (m >> 8) & 0xFFu);
}

// E8M0 byte `scale` relative to `largest`, as two halves: 2^(15 + scale - largest), 0 where that is far too small.
__device__ __forceinline__ uint32_t relative_scale(uint32_t scale, uint32_t largest) {
  const int exponent = static_cast<int>(scale) - static_cast<int>(largest) + 30;
  return static_cast<uint32_t>(max(exponent, 0)) * 0x04000400u;
}
// What sums of products with halves_of_e2m1(…, relative_scale(…)) have to be multiplied by.
__device__ __forceinline__ float largest_scale(uint32_t largest) { return __uint_as_float(largest << 23) * 0x1p-9f; }

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

// Eight bfloat16 times a power of two, as halves in the order of halves_of_e2m1.
__device__ __forceinline__ uint4 halves_in_order(const uint4& x, float power) {
  const auto low = [power](uint32_t pair) { return __uint_as_float(pair << 16) * power; };
  const auto high = [power](uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u) * power; };
  return make_uint4(ptx::half_pair(low(x.x), low(x.y)), ptx::half_pair(low(x.z), low(x.w)), ptx::half_pair(high(x.x), high(x.y)),
                    ptx::half_pair(high(x.z), high(x.w)));
}
}  // namespace dsv4

#endif  // DSV4_CUDA_WEIGHT_MMA_CUH_
