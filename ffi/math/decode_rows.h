// Rows of stored weights as floats, on the CPU. Where the processor has AVX2 and F16C both formats become halves first,
// whose upper byte an E2M1 value fills and of which E4M3 is a part, and the processor widens those.
#ifndef DSV4_MATH_DECODE_ROWS_H_
#define DSV4_MATH_DECODE_ROWS_H_

#include <algorithm>
#include <cstdint>

#include "common/vector_clones.h"
#include "formats/dequantise.h"

#if defined(__GNUC__) && defined(__x86_64__)
#define DSV4_HALVES_ON_CPU
#include <immintrin.h>
#endif

namespace dsv4 {

#ifdef DSV4_HALVES_ON_CPU
inline bool has_halves() {
  static const bool has =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  return has;
}

// Whole groups of 16; returns how many values are done. A code that is NaN stops it.
__attribute__((target("avx2,f16c"))) inline int64_t decode_e4m3_halves(const uint8_t* codes, int64_t n, float scale,
                                                                       float* out) {
  const __m256 factor = _mm256_set1_ps(scale * 256.0f);  // the exponents of halves are biased by 8 more
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    const __m128i magnitude = _mm_and_si128(bytes, _mm_set1_epi8(0x7F));
    if (_mm_movemask_epi8(_mm_cmpeq_epi8(magnitude, _mm_set1_epi8(0x7F)))) break;
    const __m256i wide = _mm256_cvtepi8_epi16(bytes);  // the sign in bit 15, the rest in 0 … 6
    const __m256i half = _mm256_or_si256(_mm256_and_si256(wide, _mm256_set1_epi16(static_cast<int16_t>(0x8000))),
                                         _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7F)), 7));
    _mm256_storeu_ps(out + i, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_castsi256_si128(half)), factor));
    _mm256_storeu_ps(out + i + 8, _mm256_mul_ps(_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1)), factor));
  }
  return i;
}

// Four rows, `pitch` apart, of n codes (a multiple of 8) with one scale, times x: added to sum. False for a code that
// is NaN.
__attribute__((target("avx2,f16c,fma"))) inline bool dot_e4m3_halves(const uint8_t* codes, int64_t pitch, int64_t n,
                                                                     float scale, const float* x, float* sum) {
  __m256 total[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
  __m128i nan = _mm_setzero_si128();
  for (int64_t i = 0; i < n; i += 8) {
    const __m256 v = _mm256_loadu_ps(x + i);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + r * pitch + i)));
      const __m128i magnitude = _mm_and_si128(wide, _mm_set1_epi16(0x7F));
      nan = _mm_max_epi16(nan, magnitude);
      const __m128i half =
          _mm_or_si128(_mm_and_si128(wide, _mm_set1_epi16(static_cast<int16_t>(0x8000))), _mm_slli_epi16(magnitude, 7));
      total[r] = _mm256_fmadd_ps(_mm256_cvtph_ps(half), v, total[r]);
    }
  }
  if (_mm_movemask_epi8(_mm_cmpeq_epi16(nan, _mm_set1_epi16(0x7F)))) return false;
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(total[0], total[1]), _mm256_hadd_ps(total[2], total[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  _mm_storeu_ps(sum, _mm_fmadd_ps(four, _mm_set1_ps(scale * 256.0f), _mm_loadu_ps(sum)));
  return true;
}

// One group of 32.
__attribute__((target("avx2,f16c"))) inline void decode_e2m1_halves(const uint8_t* codes, float scale, float* out) {
  const __m128i table =
      _mm_setr_epi8(0, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46, static_cast<char>(0x80), static_cast<char>(0xB8),
                    static_cast<char>(0xBC), static_cast<char>(0xBE), static_cast<char>(0xC0), static_cast<char>(0xC2),
                    static_cast<char>(0xC4), static_cast<char>(0xC6));
  const __m256 factor = _mm256_set1_ps(scale);
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), low = _mm_set1_epi8(15);
  const __m128i even = _mm_shuffle_epi8(table, _mm_and_si128(bytes, low));
  const __m128i odd = _mm_shuffle_epi8(table, _mm_and_si128(_mm_srli_epi16(bytes, 4), low));
  const __m128i both[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)}, zero = _mm_setzero_si128();
  for (int i = 0; i < 2; ++i) {
    _mm256_storeu_ps(out + 16 * i, _mm256_mul_ps(_mm256_cvtph_ps(_mm_unpacklo_epi8(zero, both[i])), factor));
    _mm256_storeu_ps(out + 16 * i + 8, _mm256_mul_ps(_mm256_cvtph_ps(_mm_unpackhi_epi8(zero, both[i])), factor));
  }
}
#endif

DSV4_VECTOR_CLONES inline void decode_e4m3_plain(const uint8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = e4m3_value(codes[i]) * scale;
}

// n E4M3 codes times a scale.
inline void decode_e4m3(const uint8_t* codes, int64_t n, float scale, float* out) {
  int64_t done = 0;
#ifdef DSV4_HALVES_ON_CPU
  if (has_halves()) done = decode_e4m3_halves(codes, n, scale, out);
#endif
  if (done < n) decode_e4m3_plain(codes + done, n - done, scale, out + done);
}

// A row of n E2M1 codes, two a byte, with an E8M0 scale per 32.
inline void decode_e2m1_row(const uint8_t* codes, const uint8_t* scale, int64_t n, float* out) {
  for (int64_t g = 0; g < n / 32; ++g) {
    const float value = e8m0_value(scale[g]);
#ifdef DSV4_HALVES_ON_CPU
    if (has_halves()) {
      decode_e2m1_halves(codes + g * 16, value, out + g * 32);
      continue;
    }
#endif
    for (int64_t i = g * 16; i < (g + 1) * 16; ++i) {
      out[2 * i] = e2m1_value(codes[i]) * value;
      out[2 * i + 1] = e2m1_value(static_cast<uint32_t>(codes[i]) >> 4) * value;
    }
  }
}

}  // namespace dsv4

#endif  // DSV4_MATH_DECODE_ROWS_H_
