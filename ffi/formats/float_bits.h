// float32, bfloat16 and E4M3 as bits: the arithmetic every handler shares, on the host and on the device.
// Nothing here depends on the rounding mode, on fused multiply-adds or on how denormals are treated.
#ifndef DSV4_FORMATS_FLOAT_BITS_H_
#define DSV4_FORMATS_FLOAT_BITS_H_

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DSV4_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DSV4_HOST_DEVICE inline
#endif

namespace dsv4 {

constexpr uint32_t kFloatInf = 0x7F800000u;
constexpr uint32_t kFloatNaN = 0x7FC00000u;
constexpr uint8_t kE4M3NaN = 0x7F;

// Storage types: a bfloat16 value travels as its 16 bits.
struct BFloat16 {
  uint16_t bits;
};

DSV4_HOST_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

DSV4_HOST_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

DSV4_HOST_DEVICE float to_float(float x) { return x; }
DSV4_HOST_DEVICE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

// To nearest, ties to even; every NaN becomes 0x7fc0.
DSV4_HOST_DEVICE BFloat16 to_bf16(float x) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > kFloatInf ? 0x7FC0u : rounded)};
}

// E4M3 code of a finite float, to nearest, ties to even, clamped to +-448; the sign is kept, that of zero too.
DSV4_HOST_DEVICE uint32_t to_e4m3(float x) {
  const uint32_t bits = bits_of(x);
  uint32_t magnitude = bits & 0x7FFFFFFFu;
  magnitude = magnitude < 0x43E00000u ? magnitude : 0x43E00000u;
  const uint32_t normal = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  // Adding 2^14 leaves multiples of 2^-9, the spacing of the codes below 2^-6, in the low bits.
  const uint32_t denormal = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u;
  return (magnitude < 0x3C800000u ? denormal : normal) | ((bits >> 24) & 0x80u);
}

}  // namespace dsv4

#endif  // DSV4_FORMATS_FLOAT_BITS_H_
