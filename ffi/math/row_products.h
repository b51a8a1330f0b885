// Products of rows of float weights with rows of activations, on the CPU.
#ifndef DSV4_MATH_ROW_PRODUCTS_H_
#define DSV4_MATH_ROW_PRODUCTS_H_

#include <cstdint>
#include <cstring>

#include "common/vector_clones.h"

namespace dsv4 {

constexpr int64_t kRowBlock = 4;      // rows of weights in a call of row_products are a multiple of it
constexpr int64_t kMostRowBlock = 16;
constexpr int64_t kTokenBlock = 4;    // rows of activations that share a load of them

// Rows of weights to take at once: of many, so that activations of many tokens are fetched less often.
inline int64_t rows_at_once(int64_t tokens) { return tokens > kTokenBlock ? kMostRowBlock : kRowBlock; }

#if defined(__GNUC__)
using Lanes = float __attribute__((vector_size(32), aligned(4), may_alias));
#else
struct Lanes {
  float lane[8];
  float operator[](int i) const { return lane[i]; }
  friend Lanes operator*(const Lanes& a, const Lanes& b) {
    Lanes c;
    for (int i = 0; i < 8; ++i) c.lane[i] = a.lane[i] * b.lane[i];
    return c;
  }
  Lanes& operator+=(const Lanes& b) {
    for (int i = 0; i < 8; ++i) lane[i] += b.lane[i];
    return *this;
  }
};
#endif

#define DSV4_SUM_LANES(v) (((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])))

// out[t * rows + r] = weights row r (of `rows`, `padded` apart) . x[t] over n values. A result does not depend on which
// or how many the other rows are.
DSV4_VECTOR_CLONES inline void row_products(const float* weights, int64_t rows, int64_t padded, int64_t n,
                                            const float* const* x, int64_t tokens, float* out) {
  const int64_t whole = n / 8 * 8;
  int64_t t = 0;
  for (; t + kTokenBlock <= tokens; t += kTokenBlock) {
    for (int64_t r = 0; r < rows; r += 2) {
      Lanes sum[kTokenBlock][2] = {};
      const float *w0 = weights + r * padded, *w1 = w0 + padded;
      for (int64_t i = 0; i < whole; i += 8) {
        const Lanes a = *reinterpret_cast<const Lanes*>(w0 + i), b = *reinterpret_cast<const Lanes*>(w1 + i);
#pragma GCC unroll 4
        for (int64_t k = 0; k < kTokenBlock; ++k) {
          const Lanes v = *reinterpret_cast<const Lanes*>(x[t + k] + i);
          sum[k][0] += a * v;
          sum[k][1] += b * v;
        }
      }
      for (int64_t k = 0; k < kTokenBlock; ++k) {
        float low = DSV4_SUM_LANES(sum[k][0]), high = DSV4_SUM_LANES(sum[k][1]);
        for (int64_t i = whole; i < n; ++i) low += w0[i] * x[t + k][i], high += w1[i] * x[t + k][i];
        out[(t + k) * rows + r] = low;
        out[(t + k) * rows + r + 1] = high;
      }
    }
  }
  for (; t < tokens; ++t) {
    for (int64_t first = 0; first < rows; first += kRowBlock) {
      Lanes sum[kRowBlock] = {};
      const float* w = weights + first * padded;
      for (int64_t i = 0; i < whole; i += 8) {
        const Lanes v = *reinterpret_cast<const Lanes*>(x[t] + i);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kRowBlock; ++r) sum[r] += *reinterpret_cast<const Lanes*>(w + r * padded + i) * v;
      }
      for (int64_t r = 0; r < kRowBlock; ++r) {
        float total = DSV4_SUM_LANES(sum[r]);
        for (int64_t i = whole; i < n; ++i) total += w[r * padded + i] * x[t][i];
        out[t * rows + first + r] = total;
      }
    }
  }
}

#undef DSV4_SUM_LANES

}  // namespace dsv4

#endif  // DSV4_MATH_ROW_PRODUCTS_H_
