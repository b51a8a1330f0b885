// Decoding stored FP4 keys on the host.
#ifndef DSV4_FORMATS_KEY_ROWS_H_
#define DSV4_FORMATS_KEY_ROWS_H_

#include <cstdint>

#include "common/vector_clones.h"
#include "formats/dequantise.h"

namespace dsv4 {

// codes (dim / 2), scales (dim / group) -> out (dim); E4M3 scales for a group of 16, else powers of two.
DSV4_VECTOR_CLONES static void decode_key(const uint8_t* codes, const uint8_t* scales, int64_t dim, int64_t group,
                                          float* out) {
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
