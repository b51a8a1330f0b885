// Products of rows of float weights with rows of activations, on the CPU.
#ifndef DSV4_MATH_ROW_PRODUCTS_H_
#define DSV4_MATH_ROW_PRODUCTS_H_

#include <cstdint>
#include <cstring>

#include "common/vector_clones.h"

namespace dsv4 {

constexpr int64_t kRowBlock = 4;  // rows of weights in a call of row_products are a multiple of it
constexpr int64_t kMostRowBlock = 16;

// Rows of weights to take at once: of many, so that activations of many tokens are fetched less often.
inline int64_t rows_at_once(int64_t tokens) { return tokens > 4 ? kMostRowBlock : kRowBlock; }

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

// How a product runs: values at a time, and rows of activations that share a load of weights.
struct Narrow {
  using V = Lanes;
  static constexpr int kLanes = 8, kTokens = 3;
};
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__)
#define DSV4_WIDE_LANES
// For processors with AVX-512, which have twice as many registers.
struct Wide {
  using V = float __attribute__((vector_size(64), aligned(4), may_alias));
  static constexpr int kLanes = 16, kTokens = 6;
};
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define DSV4_INTO_CLONES __attribute__((always_inline)) inline
#else
#define DSV4_INTO_CLONES inline
#endif

// The sums of four rows' lanes: ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)) of each.
DSV4_INTO_CLONES void sum_lanes(const Lanes (&v)[kRowBlock], float (&out)[kRowBlock]) {
#if defined(__GNUC__)
  using Four = float __attribute__((vector_size(16)));
  Four half[kRowBlock];
  for (int r = 0; r < kRowBlock; ++r) {
    const Lanes lanes = v[r];
    half[r] = __builtin_shufflevector(lanes, lanes, 0, 1, 2, 3) + __builtin_shufflevector(lanes, lanes, 4, 5, 6, 7);
  }
  const Four first =
      __builtin_shufflevector(half[0], half[1], 0, 4, 1, 5) + __builtin_shufflevector(half[0], half[1], 2, 6, 3, 7);
  const Four second =
      __builtin_shufflevector(half[2], half[3], 0, 4, 1, 5) + __builtin_shufflevector(half[2], half[3], 2, 6, 3, 7);
  const Four sums =
      __builtin_shufflevector(first, second, 0, 1, 4, 5) + __builtin_shufflevector(first, second, 2, 3, 6, 7);
  std::memcpy(out, &sums, sizeof(sums));
#else
  for (int r = 0; r < kRowBlock; ++r)
    out[r] = ((v[r][0] + v[r][4]) + (v[r][2] + v[r][6])) + ((v[r][1] + v[r][5]) + (v[r][3] + v[r][7]));
#endif
}

DSV4_INTO_CLONES Lanes narrow(const Lanes& v) { return v; }
#ifdef DSV4_WIDE_LANES
DSV4_INTO_CLONES Lanes narrow(const Wide::V& v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
         __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
#endif

// Four rows of weights times kTokens rows of x, to out[k * pitch + r].
template <typename How, int kTokens>
DSV4_INTO_CLONES void four_rows(const float* w, int64_t padded, int64_t n, const float* const* x, float* out,
                                int64_t pitch) {
  using V = typename How::V;
  constexpr int64_t kLanes = How::kLanes;
  const int64_t whole = n / kLanes * kLanes;
  V sum[kTokens][kRowBlock] = {};
  for (int64_t i = 0; i < whole; i += kLanes) {
    V a[kRowBlock];
#pragma GCC unroll 4
    for (int64_t r = 0; r < kRowBlock; ++r) a[r] = *reinterpret_cast<const V*>(w + r * padded + i);
#pragma GCC unroll 6
    for (int64_t k = 0; k < kTokens; ++k) {
      const V v = *reinterpret_cast<const V*>(x[k] + i);
#pragma GCC unroll 4
      for (int64_t r = 0; r < kRowBlock; ++r) sum[k][r] += a[r] * v;
    }
  }
#pragma GCC unroll 6
  for (int64_t k = 0; k < kTokens; ++k) {
    Lanes lanes[kRowBlock];
    float totals[kRowBlock];
    for (int64_t r = 0; r < kRowBlock; ++r) lanes[r] = narrow(sum[k][r]);
    sum_lanes(lanes, totals);
    for (int64_t r = 0; r < kRowBlock; ++r) {
      for (int64_t i = whole; i < n; ++i) totals[r] += w[r * padded + i] * x[k][i];
      out[k * pitch + r] = totals[r];
    }
  }
}

// out[t * rows + r] = weights row r (of `rows`, `padded` apart) . x[t] over n values. A result does not depend on which
// or how many the other rows are.
template <typename How>
DSV4_INTO_CLONES void all_rows(const float* weights, int64_t rows, int64_t padded, int64_t n, const float* const* x,
                               int64_t tokens, float* out) {
  int64_t t = 0;
  for (; t + How::kTokens <= tokens; t += How::kTokens) {
    for (int64_t r = 0; r < rows; r += kRowBlock)
      four_rows<How, How::kTokens>(weights + r * padded, padded, n, x + t, out + t * rows + r, rows);
  }
  for (; t < tokens; ++t) {
    for (int64_t r = 0; r < rows; r += kRowBlock)
      four_rows<How, 1>(weights + r * padded, padded, n, x + t, out + t * rows + r, rows);
  }
}

#ifdef DSV4_WIDE_LANES
__attribute__((target("avx512f,avx512vl,avx512dq,avx2,fma"))) inline void wide_row_products(
    const float* weights, int64_t rows, int64_t padded, int64_t n, const float* const* x, int64_t tokens, float* out) {
  all_rows<Wide>(weights, rows, padded, n, x, tokens, out);
}
#endif

DSV4_VECTOR_CLONES inline void narrow_row_products(const float* weights, int64_t rows, int64_t padded, int64_t n,
                                                   const float* const* x, int64_t tokens, float* out) {
  all_rows<Narrow>(weights, rows, padded, n, x, tokens, out);
}

inline void row_products(const float* weights, int64_t rows, int64_t padded, int64_t n, const float* const* x,
                         int64_t tokens, float* out) {
#ifdef DSV4_WIDE_LANES
  static const bool is_wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  if (is_wide) return wide_row_products(weights, rows, padded, n, x, tokens, out);
#endif
  narrow_row_products(weights, rows, padded, n, x, tokens, out);
}

}  // namespace dsv4

#endif  // DSV4_MATH_ROW_PRODUCTS_H_
