// project on the CPU: rows of the weight are read where they lie, some at a time, as floats.
#include <algorithm>
#include <memory>
#include <vector>

#include "common/export.h"
#include "common/parallel_for.h"
#include "common/vector_clones.h"
#include "formats/dequantise.h"
#include "math/decode_rows.h"
#include "math/row_products.h"
#include "projection/op.h"

namespace dsv4 {
namespace {

constexpr int64_t kWorkPerChunk = 1 << 17;  // values decoded or multiplied: some 10 us

void decode_row(const uint8_t* codes, const uint8_t* scale, int64_t n, float* out) {
  for (int64_t first = 0; first < n; first += kWeightBlock) {
    decode_e4m3(codes + first, std::min(kWeightBlock, n - first), e8m0_value(scale[first / kWeightBlock]), out + first);
  }
}

DSV4_VECTOR_CLONES void widen(const BFloat16* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

// One token's products with four rows, without a copy of them; false where that cannot be.
bool dot_rows(const Projection& call, int64_t row, const float* x, float* out) {
#ifdef DSV4_HALVES_ON_CPU
  static_assert(kRowBlock == 4);
  if (!has_halves() || call.columns % 8 || row / kWeightBlock != (row + kRowBlock - 1) / kWeightBlock) return false;
  std::fill(out, out + kRowBlock, 0.0f);
  const uint8_t* scale = call.scale + row / kWeightBlock * call.scale_columns();
  for (int64_t i = 0; i < call.columns; i += kWeightBlock) {
    if (!dot_e4m3_halves(call.codes + row * call.columns + i, call.columns, std::min(kWeightBlock, call.columns - i),
                         e8m0_value(scale[i / kWeightBlock]), x + i, out)) {
      return false;
    }
  }
  return true;
#else
  return false;
#endif
}

// Sums out[t * pitch + r] as rows `row` … of y.
void store(const Projection& call, int64_t row, int64_t rows, int64_t pitch, const float* out) {
  for (int64_t t = 0; t < call.tokens; ++t) {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = t * call.rows + row + r;
      if (call.is_float) {
        static_cast<float*>(call.y)[at] = out[t * pitch + r];
      } else {
        static_cast<BFloat16*>(call.y)[at] = to_bf16(out[t * pitch + r]);
      }
    }
  }
}

ffi::Error project(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results) {
  Projection call;
  const ffi::Error error = bind_projection(args, results, &call);
  if (error.failure()) return error;
  const float* x = static_cast<const float*>(call.x);
  std::unique_ptr<float[]> wide;
  if (!call.is_float) {
    const int64_t n = call.tokens * call.groups * call.columns;
    wide.reset(new float[n]);
    widen(static_cast<const BFloat16*>(call.x), n, wide.get());
    x = wide.get();
  }
  const int64_t in_group = call.rows / call.groups, at_once = rows_at_once(call.tokens);
  const int64_t blocks = (in_group + at_once - 1) / at_once, work = at_once * call.columns * (2 + call.tokens / 2);
  parallel_for(pool, call.groups * blocks, std::max<int64_t>(1, kWorkPerChunk / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) {
                 std::unique_ptr<float[]> weights(new float[at_once * call.columns]);
                 std::vector<float> out(call.tokens * at_once);
                 std::vector<const float*> of_token(call.tokens);
                 int64_t current = -1;
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t group = item / blocks, first = item % blocks * at_once;
                   const int64_t rows = std::min(at_once, in_group - first);
                   if (group != current) {
                     for (int64_t t = 0; t < call.tokens; ++t)
                       of_token[t] = x + (t * call.groups + group) * call.columns;
                     current = group;
                   }
                   if (call.tokens == 1 && rows == kRowBlock &&
                       dot_rows(call, group * in_group + first, of_token[0], out.data())) {
                     store(call, group * in_group + first, rows, at_once, out.data());
                     continue;
                   }
                   for (int64_t r = 0; r < at_once; ++r) {
                     const int64_t row = group * in_group + first + std::min(r, rows - 1);
                     decode_row(call.codes + row * call.columns, call.scale + row / kWeightBlock * call.scale_columns(),
                                call.columns, weights.get() + r * call.columns);
                   }
                   row_products(weights.get(), at_once, call.columns, call.columns, of_token.data(), call.tokens,
                                out.data());
                   store(call, group * in_group + first, rows, at_once, out.data());
                 }
               });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Project);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Project, dsv4::project,
                              xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets());
