// FP4 (E2M1) keys: a group of 16 values with an E4M3 scale, or of 32 with a power of two (E8M0).
// This is dsv4_jax/ops/formats/fp4.py bit for bit.
#ifndef DSV4_FORMATS_FP4_H_
#define DSV4_FORMATS_FP4_H_

#include <cstdint>

#include "formats/float_bits.h"
#include "formats/float_math.h"
#include "formats/quantise.h"

namespace dsv4 {

constexpr uint32_t kE2M1NaN = 7;  // the code of every value in a group whose scale is NaN

// The float32 value of a finite E4M3 code.
DSV4_HOST_DEVICE float from_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7Fu;
  const float value =
      magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f : float_of((magnitude << 20) + (120u << 23));
  return code & 0x80u ? -value : value;
}

// A group's scale: the byte stored, and its value.
struct GroupScale {
  float value;
  uint8_t byte;
  bool finite;

  // amax_bits: the largest magnitude_bits of the group.
  DSV4_HOST_DEVICE GroupScale(uint32_t amax_bits, bool is_e4m3) {
    finite = amax_bits < kFloatInf;
    const uint32_t amax = amax_bits < kAmaxFloorBits ? kAmaxFloorBits : amax_bits;
    uint32_t code;
    if (is_e4m3) {
      code = to_e4m3(divide(float_of(amax), 6.0f));
      code = code < 1 ? 1 : code;
      value = from_e4m3(code);
    } else {
      // 6 = 1.5 * 4: amax / 6 is above 2^(e - 2) iff its mantissa is above 1.5. The floor keeps the exponent positive.
      code = (amax >> 23) - 2 + ((amax & 0x7FFFFFu) > 0x400000u ? 1 : 0);
      value = float_of(code << 23);
    }
    byte = static_cast<uint8_t>(finite ? code : is_e4m3 ? 0x7Fu : 0xFFu);
  }

  // Code of the E2M1 value nearest to x / value, ties to the even code, clamped to +-6. A bound between two codes times
  // a scale of at most 4 significant bits is exact.
  DSV4_HOST_DEVICE uint32_t encode(float x) const {
    if (!finite) return kE2M1NaN;
    const float a = float_of(magnitude_bits(x));
    const uint32_t code = (a > 0.25f * value) + (a >= 0.75f * value) + (a > 1.25f * value) + (a >= 1.75f * value) +
                          (a > 2.5f * value) + (a >= 3.5f * value) + (a > 5.0f * value);
    return code | ((bits_of(x) >> 28) & 8u);
  }
};

}  // namespace dsv4

#endif  // DSV4_FORMATS_FP4_H_
