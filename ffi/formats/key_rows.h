// Where the FP4 keys of a layer lie, and writing and decoding them on the host.
#ifndef DSV4_FORMATS_KEY_ROWS_H_
#define DSV4_FORMATS_KEY_ROWS_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/vector_clones.h"
#include "formats/dequantise.h"
#include "formats/float_math.h"
#include "formats/fp4.h"

namespace dsv4 {

struct KeyRows {
  uint8_t* keys;       // (rows, dim / 2) E2M1 pairs
  uint8_t* scale;      // (rows, dim / group)
  int64_t dim, group;  // group: values that share a scale; 16: E4M3 scales, 32: powers of two
  bool rotate;         // by the Hadamard matrix, before they are written
};

// Times the orthonormal Hadamard matrix in natural order; n is a power of two.
inline void rotate_by_hadamard(float* x, int64_t n) {
  for (int64_t stride = 1; stride < n; stride *= 2) {
    for (int64_t i = 0; i < n; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  const float scale = divide(1.0f, std::sqrt(static_cast<float>(n)));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

// Writes a key, whose values x may be rotated in place. The device form is in cuda/key_writer.cuh.
inline void write_key(const KeyRows& keys, int64_t row, float* x) {
  const int64_t dim = keys.dim;
  if (keys.rotate) rotate_by_hadamard(x, dim);
  uint8_t* codes = keys.keys + row * (dim / 2);
  for (int64_t first = 0; first < dim; first += keys.group) {
    uint32_t amax = 0;
    for (int64_t i = first; i < first + keys.group; ++i) amax = std::max(amax, magnitude_bits(x[i]));
    const GroupScale scale(amax, keys.group == 16);
    keys.scale[row * (dim / keys.group) + first / keys.group] = scale.byte;
    for (int64_t i = first; i < first + keys.group; i += 2) {
      codes[i / 2] = static_cast<uint8_t>(scale.encode(x[i]) | (scale.encode(x[i + 1]) << 4));
    }
  }
}

// codes (dim / 2), scales (dim / group) -> out (dim); E4M3 scales for a group of 16, else powers of two.
[[maybe_unused]] DSV4_VECTOR_CLONES static void decode_key(const uint8_t* codes, const uint8_t* scales, int64_t dim,
                                                           int64_t group, float* out) {
  // In two passes, whose loops are long enough for vectors.
  for (int64_t i = 0; i < dim / 2; ++i) {
    out[2 * i] = e2m1_value(codes[i]);
    out[2 * i + 1] = e2m1_value(static_cast<uint32_t>(codes[i]) >> 4);
  }
  for (int64_t g = 0; g < dim / group; ++g) {
    const float scale = group == 16 ? e4m3_value(scales[g]) : e8m0_value(scales[g]);
    for (int64_t i = g * group; i < (g + 1) * group; ++i) out[i] *= scale;
  }
}

}  // namespace dsv4

#endif  // DSV4_FORMATS_KEY_ROWS_H_
