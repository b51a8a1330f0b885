// Activations as sums of two E4M3 values: v = high + low / 16, exactly for bfloat16 within 2^14 of a row's largest
// value, to 2^-10 for halves. Weights are E4M3 already, or nearly (E2M1), and meet them on the tensor cores without a
// rounding.
#ifndef DSV4_CUDA_SPLIT_E4M3_CUH_
#define DSV4_CUDA_SPLIT_E4M3_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dsv4 {

constexpr float kLow = 1.0f / 16;

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

__device__ __forceinline__ uint32_t two_e4m3(float first, float second) {
  uint16_t codes;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
  return codes;
}
__device__ __forceinline__ float2 floats_of_e4m3(uint32_t codes) {
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(codes)));
  return floats_of(halves, __half());
}
// Four values, already in range, as codes of their high and low parts.
__device__ __forceinline__ uint2 split_four(float a, float b, float c, float d) {
  const uint32_t first = two_e4m3(a, b), second = two_e4m3(c, d);
  const float2 p = floats_of_e4m3(first), q = floats_of_e4m3(second);
  const uint32_t low_first = two_e4m3((a - p.x) * 16, (b - p.y) * 16),
                 low_second = two_e4m3((c - q.x) * 16, (d - q.y) * 16);
  return make_uint2(first | second << 16, low_first | low_second << 16);
}

// Four 8 x 16-byte matrices of shared memory; lane 8 m + r names row r of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

}  // namespace dsv4

#endif  // DSV4_CUDA_SPLIT_E4M3_CUH_
