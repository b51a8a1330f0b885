// Where the FP8 records of a layer lie, of a pool or of a ring.
#ifndef DSV4_FORMATS_RECORD_ROWS_H_
#define DSV4_FORMATS_RECORD_ROWS_H_

#include <cstdint>

#include "formats/float_bits.h"

namespace dsv4 {

struct RecordRows {
  uint8_t* nope;     // (rows, n) E4M3
  BFloat16* rope;    // (rows, r)
  float* inv_scale;  // (rows), or null where there is a scale for every 64 values
  uint8_t* scales;   // (rows, scale_width) E8M0, or null
  int64_t scale_width;
};

}  // namespace dsv4

#endif  // DSV4_FORMATS_RECORD_ROWS_H_
