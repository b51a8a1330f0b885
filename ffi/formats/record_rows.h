// Where the FP8 records of a layer lie, of a pool or of a ring, and writing them on the host.
#ifndef DSV4_FORMATS_RECORD_ROWS_H_
#define DSV4_FORMATS_RECORD_ROWS_H_

#include <cstdint>

#include "formats/float_bits.h"
#include "formats/quantise.h"

namespace dsv4 {

struct RecordRows {
  uint8_t* nope;     // (rows, nope_width) E4M3
  BFloat16* rope;    // (rows, rope_width)
  float* inv_scale;  // (rows), or null where there is a scale for every 64 values
  uint8_t* scales;   // (rows, scale_width) E8M0, or null
  int64_t scale_width, nope_width, rope_width;

  int64_t width() const { return nope_width + rope_width; }
};

// The device form is in cuda/record_writer.cuh.
template <typename T>
inline void write_record(const RecordRows& record, int64_t row, const T* values) {
  const int64_t n = record.nope_width;
  uint8_t* nope = record.nope + row * n;
  if (record.scales) {
    quantise_row_by_groups(values, n, nope, record.scales + row * record.scale_width, record.scale_width);
  } else {
    record.inv_scale[row] = quantise_row(values, n, nope);
  }
  BFloat16* rope = record.rope + row * record.rope_width;
  for (int64_t i = 0; i < record.rope_width; ++i) rope[i] = to_bf16(to_float(values[n + i]));
}

}  // namespace dsv4

#endif  // DSV4_FORMATS_RECORD_ROWS_H_
