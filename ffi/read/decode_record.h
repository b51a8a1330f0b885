// Decoding a stored record on the host.
#ifndef DSV4_READ_DECODE_RECORD_H_
#define DSV4_READ_DECODE_RECORD_H_

#include <cstdint>

#include "common/vector_clones.h"
#include "formats/dequantise.h"
#include "read/op.h"

namespace dsv4 {

inline void store(float value, float* out) { *out = value; }
inline void store(float value, BFloat16* out) { *out = to_bf16(value); }

[[maybe_unused]] DSV4_VECTOR_CLONES static void decode_codes(const uint8_t* codes, int64_t n, float scale, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = e4m3_value(codes[i]) * scale;
}

[[maybe_unused]] DSV4_VECTOR_CLONES static void decode_codes(const uint8_t* codes, int64_t n, float scale,
                                                             BFloat16* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(e4m3_value(codes[i]) * scale);
}

// out: values of the record, in the order of its channels.
template <typename Out>
inline void decode_record(const ReadRecords& call, int64_t row, Out* out) {
  const uint8_t* codes = call.nope + row * call.nope_width;
  if (call.scale_width == 0) {
    decode_codes(codes, call.nope_width, static_cast<const float*>(call.scale)[row], out);
  } else {
    const uint8_t* scales = static_cast<const uint8_t*>(call.scale) + row * call.scale_width;
    for (int64_t i = 0; i < call.nope_width; i += kE8M0Group) {
      decode_codes(codes + i, kE8M0Group, e8m0_value(scales[i / kE8M0Group]), out + i);
    }
  }
  const BFloat16* rope = call.rope + row * call.rope_width;
  for (int64_t i = 0; i < call.rope_width; ++i) store(to_float(rope[i]), out + call.nope_width + i);
}

}  // namespace dsv4

#endif  // DSV4_READ_DECODE_RECORD_H_
