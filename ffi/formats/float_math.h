// float32 functions whose results are the same bits on the host and on the device: every step is one correctly rounded
// operation, in a written order; a fused multiply-add is written out, and the compiler makes none of its own
// (-ffp-contract=off, --fmad=false).
#ifndef DSV4_FORMATS_FLOAT_MATH_H_
#define DSV4_FORMATS_FLOAT_MATH_H_

#include <cmath>
#include <cstdint>

#include "formats/float_bits.h"

#ifdef __CUDACC__
#include "cuda/ptx.cuh"
#endif

namespace dsv4 {

DSV4_HOST_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return std::fma(a, b, c);
#endif
}

// The larger value; NaN if one is NaN.
DSV4_HOST_DEVICE float larger(float a, float b) {
#ifdef __CUDA_ARCH__
  return ptx::larger(a, b);
#else
  return a > b || a != a ? a : b;
#endif
}

// e^x for x <= 0, to 2e-7 where the result matters beside 1; e^-87 below -87; NaN for NaN.
DSV4_HOST_DEVICE float exp_of_negative(float x) {
  x = larger(x, -87.0f);
  // x / ln 2 = n + f with n an integer: adding 1.5 * 2^23 rounds to it, and leaves it in the sum's low bits.
  const float shifted = fused(x, 1.44269504f, 12582912.0f);
  const float f = fused(x, 1.44269504f, -(shifted - 12582912.0f));
  // Minimax on |f| <= 0.5 for 2^f.
  float p = 0x1.5bb9e4p-10f;
  p = fused(p, f, 0x1.3ceab4p-7f);
  p = fused(p, f, 0x1.c6b754p-5f);
  p = fused(p, f, 0x1.ebf9bcp-3f);
  p = fused(p, f, 0x1.62e42ap-1f);
  p = fused(p, f, 1.0f);
  return p * float_of((bits_of(shifted) << 23) + 0x3F800000u);
}

// 1 / sqrt(x), each operation rounded.
DSV4_HOST_DEVICE float inverse_sqrt(float x) {
#ifdef __CUDA_ARCH__
  return __frcp_rn(__fsqrt_rn(x));
#else
  return 1.0f / std::sqrt(x);
#endif
}

DSV4_HOST_DEVICE float divide(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdiv_rn(a, b);
#else
  return a / b;
#endif
}

// RMSNorm sums the squares of neighbouring channels in pairs, then neighbouring pairs of sums, and so on: a tree that
// threads can share however many channels each of them has.
DSV4_HOST_DEVICE float quad_of_squares(float a, float b, float c, float d) { return (a * a + b * b) + (c * c + d * d); }

}  // namespace dsv4

#endif  // DSV4_FORMATS_FLOAT_MATH_H_
