// RMSNorm and RoPE of one vector on the host; the device forms add in the same order.
#ifndef DSV4_MATH_RMS_NORM_ROPE_H_
#define DSV4_MATH_RMS_NORM_ROPE_H_

#include <cstdint>
#include <vector>

#include "formats/float_math.h"

namespace dsv4 {

inline float add(float a, float b) { return a + b; }

// Adds neighbouring pairs until one sum is left, in the first place.
template <typename Sum>
void add_pairs(std::vector<Sum>& sums) {
  for (size_t n = sums.size(); n > 1; n = (n + 1) / 2) {
    for (size_t i = 0; i < n / 2; ++i) sums[i] = add(sums[2 * i], sums[2 * i + 1]);
    if (n % 2) sums[n / 2] = sums[n - 1];
  }
}

class RmsNormRope {
 public:
  // x (dim) / rms(x) * weight; then its last rope_dim values as pairs, rotated by cos and sin (rope_dim / 2).
  void operator()(float* x, int64_t dim, int64_t rope_dim, const float* weight, const float* cos, const float* sin,
                  float eps) {
    const auto at = [&](int64_t i) { return i < dim ? x[i] : 0.0f; };
    squares_.clear();
    for (int64_t i = 0; i < dim; i += 4) squares_.push_back(quad_of_squares(at(i), at(i + 1), at(i + 2), at(i + 3)));
    add_pairs(squares_);
    const float scale = inverse_sqrt(divide(squares_[0], static_cast<float>(dim)) + eps);
    for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * scale * weight[i];
    float* pairs = x + dim - rope_dim;
    for (int64_t i = 0; i < rope_dim / 2; ++i) {
      const float even = pairs[2 * i], odd = pairs[2 * i + 1];
      pairs[2 * i] = even * cos[i] - odd * sin[i];
      pairs[2 * i + 1] = even * sin[i] + odd * cos[i];
    }
  }

 private:
  std::vector<float> squares_;
};

}  // namespace dsv4

#endif  // DSV4_MATH_RMS_NORM_ROPE_H_
