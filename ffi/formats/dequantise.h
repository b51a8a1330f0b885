// Stored codes as the floats they stand for, on the host and on the device: dsv4_jax/ops/formats/fp8.py, ue8m0.py and
// fp4.py bit for bit, but for the sign and the payload of a NaN.
#ifndef DSV4_FORMATS_DEQUANTISE_H_
#define DSV4_FORMATS_DEQUANTISE_H_

#include <cstdint>

#include "formats/float_bits.h"
#include "formats/quantise.h"

namespace dsv4 {

// All ones if true. Choosing by masks, and not by branches, makes vector code of a loop.
DSV4_HOST_DEVICE uint32_t mask_of(bool condition) { return 0u - static_cast<uint32_t>(condition); }

// The value of an E4M3 code. No operand is a denormal float: it does not matter whether those are flushed.
DSV4_HOST_DEVICE float e4m3_value(uint32_t code) {
  const uint32_t shifted = (code & 0x7Fu) << 20, is_small = mask_of(shifted < (8u << 20));
  const uint32_t normal = shifted + (120u << 23);
  const uint32_t small = bits_of(float_of(shifted + (121u << 23)) - float_of(121u << 23));  // shifted / 2^29
  const uint32_t nan = kFloatNaN & mask_of(shifted == (0x7Fu << 20));
  return float_of((small & is_small) | (normal & ~is_small) | nan | ((code & 0x80u) << 24));
}

// 2^(byte - 127), NaN for 0xff. Byte 0 does not arise from quantising.
DSV4_HOST_DEVICE float e8m0_value(uint32_t byte) { return float_of(byte == kE8M0NaN ? kFloatNaN : byte << 23); }

// The value of an E2M1 code in the low four bits: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
DSV4_HOST_DEVICE float e2m1_value(uint32_t code) {
  const uint32_t magnitude = code & 7u, is_small = mask_of(magnitude < 2);
  const uint32_t normal = (magnitude << 22) + (126u << 23), small = (0u - magnitude) & (126u << 23);
  return float_of((small & is_small) | (normal & ~is_small) | ((code & 8u) << 28));
}

}  // namespace dsv4

#endif  // DSV4_FORMATS_DEQUANTISE_H_
