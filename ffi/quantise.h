// The FP8 record: a row of E4M3 codes with one float32 scale.
//
//   inv_scale = max(amax |x|, 1e-4) / 448,  code = E4M3(x / inv_scale)
//
// with both divisions correctly rounded. A row that holds a NaN or an infinity gets the scale NaN and codes 0x7f.
// This is dsv4_jax/ops/fp8.py bit for bit. The device form is in quantise_warp.cuh.
#ifndef DSV4_QUANTISE_H_
#define DSV4_QUANTISE_H_

#include <cstdint>
#include <cstring>

#include "float_bits.h"

namespace dsv4 {

constexpr uint32_t kAmaxFloorBits = 0x38D1B717u;  // 1e-4f
constexpr float kE4M3Max = 448.0f;

// As integers, the bits of non-negative floats order like the floats; infinities and NaNs come last.
DSV4_HOST_DEVICE uint32_t magnitude_bits(float x) { return bits_of(x) & 0x7FFFFFFFu; }

// The scale of a row from the largest magnitude_bits of its values.
DSV4_HOST_DEVICE float inv_scale_of(uint32_t amax_bits) {
  if (amax_bits >= kFloatInf) return float_of(kFloatNaN);
  const float amax = float_of(amax_bits < kAmaxFloorBits ? kAmaxFloorBits : amax_bits);
#ifdef __CUDA_ARCH__
  return __fdiv_rn(amax, kE4M3Max);
#else
  return amax / kE4M3Max;
#endif
}

// Quantises the n values of a row on the host; returns inv_scale.
template <typename T>
inline float quantise_row(const T* x, int64_t n, uint8_t* codes) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t m = magnitude_bits(to_float(x[i]));
    amax = m > amax ? m : amax;
  }
  const float inv_scale = inv_scale_of(amax);
  if (amax >= kFloatInf) {
    std::memset(codes, kE4M3NaN, static_cast<size_t>(n));
    return inv_scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    const float value = to_float(x[i]);
    // The sign comes from the value: a quotient that is flushed to zero may have lost it.
    const uint32_t code = to_e4m3(value / inv_scale) & 0x7Fu;
    codes[i] = static_cast<uint8_t>(code | ((bits_of(value) >> 24) & 0x80u));
  }
  return inv_scale;
}

}  // namespace dsv4

#endif  // DSV4_QUANTISE_H_
