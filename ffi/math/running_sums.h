// The sums of a softmax that tokens enter one by one, of one channel: what a running tail holds after each token.
#ifndef DSV4_MATH_RUNNING_SUMS_H_
#define DSV4_MATH_RUNNING_SUMS_H_

#include "formats/float_math.h"

namespace dsv4 {

constexpr int kRunningSums = 5;  // top, sum, weighted, and what rounding has lost of either sum

// The largest gate so far (top), the sum of the weights e^(z - top), and that of the weighted values.
struct RunningSums {
  float top, sum, weighted, sum_lost, weighted_lost;

  static DSV4_HOST_DEVICE RunningSums of_token(float k, float z) { return {z, 1.0f, k, 0.0f, 0.0f}; }

  // The sums with one more token. Neumaier's summation: what an addition rounds away is added up apart.
  DSV4_HOST_DEVICE RunningSums with_token(float k, float z) const {
    const bool is_new_top = top < z || z != z;
    const float larger_z = is_new_top ? z : top, smaller_z = is_new_top ? top : z;
    const float e = smaller_z == larger_z ? 1.0f : exp_of_negative(smaller_z - larger_z);
    const float scale = is_new_top ? e : 1.0f, weight = is_new_top ? 1.0f : e;
    RunningSums next = {larger_z, sum * scale, weighted * scale, sum_lost * scale, weighted_lost * scale};
    add(weight, &next.sum, &next.sum_lost);
    add(weight * k, &next.weighted, &next.weighted_lost);
    return next;
  }

  // The weighted mean; NaN where a gate was infinite or NaN.
  DSV4_HOST_DEVICE float mean() const {
    const float ratio = divide(weighted + weighted_lost, sum + sum_lost);
    return (bits_of(top) & 0x7FFFFFFFu) < kFloatInf ? ratio : float_of(kFloatNaN);
  }

 private:
  static DSV4_HOST_DEVICE void add(float x, float* total, float* lost) {
    const float before = *total, after = before + x, rounded = after - before;
    *lost += (before - (after - rounded)) + (x - rounded);
    *total = after;
  }
};

}  // namespace dsv4

#endif  // DSV4_MATH_RUNNING_SUMS_H_
