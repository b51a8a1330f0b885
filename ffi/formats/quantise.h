// The FP8 records: rows of E4M3 codes, either with one float32 scale
//
//   inv_scale = max(amax |x|, 1e-4) / 448,  code = E4M3(x / inv_scale)
//
// with both divisions correctly rounded, or with a power of two for every 64 values
//
//   scale = 2^ceil(log2(max(amax |x|, 1e-4) / 448)),  code = E4M3(x / scale)
//
// stored as its exponent plus 127 (E8M0). A row, or group, that holds a NaN or an infinity gets the scale NaN and codes
// 0x7f. This is dsv4_jax/ops/formats/fp8.py and ue8m0.py bit for bit. The device form is in quantise_warp.cuh.
#ifndef DSV4_FORMATS_QUANTISE_H_
#define DSV4_FORMATS_QUANTISE_H_

#include <cstdint>
#include <cstring>

#include "formats/float_bits.h"

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

constexpr int64_t kE8M0Group = 64;  // values that share a scale
constexpr uint8_t kE8M0NaN = 0xFF;

// The E8M0 byte of a group from the largest magnitude_bits of its values.
DSV4_HOST_DEVICE uint32_t e8m0_scale_of(uint32_t amax_bits) {
  const uint32_t amax = amax_bits < kAmaxFloorBits ? kAmaxFloorBits : amax_bits;
  // 448 = 1.75 * 2^8: a larger mantissa needs the next power of two.
  return amax_bits >= kFloatInf ? kE8M0NaN : (amax >> 23) - 8 + ((amax & 0x7FFFFFu) > 0x600000u ? 1 : 0);
}

// 1 / 2^(scale - 127) for the byte of a finite group: a product with it is exact before it is rounded to a code.
DSV4_HOST_DEVICE float e8m0_reciprocal(uint32_t scale) { return float_of((254u - scale) << 23); }

// Quantises the n values of a row on the host in groups of 64; writes scale_width scales, what is too many being 0.
template <typename T>
inline void quantise_row_by_groups(const T* x, int64_t n, uint8_t* codes, uint8_t* scales, int64_t scale_width) {
  for (int64_t g = 0; g < scale_width; ++g) scales[g] = 0;
  for (int64_t first = 0; first < n; first += kE8M0Group) {
    uint32_t amax = 0;
    for (int64_t i = first; i < first + kE8M0Group; ++i) {
      const uint32_t m = magnitude_bits(to_float(x[i]));
      amax = m > amax ? m : amax;
    }
    const uint32_t scale = e8m0_scale_of(amax);
    scales[first / kE8M0Group] = static_cast<uint8_t>(scale);
    for (int64_t i = first; i < first + kE8M0Group; ++i) {
      const uint32_t code = scale == kE8M0NaN ? kE4M3NaN : to_e4m3(to_float(x[i]) * e8m0_reciprocal(scale));
      codes[i] = static_cast<uint8_t>(code);
    }
  }
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

#endif  // DSV4_FORMATS_QUANTISE_H_
