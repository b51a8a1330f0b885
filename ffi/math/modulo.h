// Division by a number that is known before: a few multiplications instead.
#ifndef DSV4_MATH_MODULO_H_
#define DSV4_MATH_MODULO_H_

#include <cstdint>

#include "formats/float_bits.h"

namespace dsv4 {

// Exact for all 32-bit numbers: D. Lemire, O. Kaser, N. Kurz, "Faster remainder by direct computation" (2019).
class Modulo {
 public:
  Modulo() = default;
  explicit Modulo(uint32_t n) : n_(n), fraction_(UINT64_MAX / n + 1) {}

  DSV4_HOST_DEVICE uint32_t operator()(uint32_t x) const {
#ifdef __CUDA_ARCH__
    const uint64_t fraction = fraction_ * x;
    const uint64_t high = fraction >> 32;
    return static_cast<uint32_t>((high * n_ + __umulhi(static_cast<uint32_t>(fraction), n_)) >> 32);
#else
    return x % n_;
#endif
  }

  DSV4_HOST_DEVICE uint32_t quotient(uint32_t x) const {
#ifdef __CUDA_ARCH__
    return n_ == 1 ? x : static_cast<uint32_t>(__umul64hi(fraction_, x));
#else
    return x / n_;
#endif
  }

 private:
  uint32_t n_ = 1;
  uint64_t fraction_ = 0;  // 2^64 / n, rounded up; 0 for 1
};

}  // namespace dsv4

#endif  // DSV4_MATH_MODULO_H_
