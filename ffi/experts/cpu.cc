// apply_experts on the CPU: an expert's rows are read where they lie, some at a time, for all tokens that picked it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "common/export.h"
#include "common/parallel_for.h"
#include "common/vector_clones.h"
#include "experts/op.h"
#include "formats/dequantise.h"
#include "math/decode_rows.h"
#include "math/row_products.h"

namespace dsv4 {
namespace {

constexpr int64_t kWorkPerChunk = 1 << 17;  // values decoded or multiplied: some 10 us

// Rows first … first + rows - 1, and the last again up to at_once.
void decode_rows(const ExpertMatrix& matrix, int64_t first, int64_t rows, int64_t at_once, int64_t columns,
                 float* out) {
  for (int64_t r = 0; r < at_once; ++r) {
    const int64_t row = first + std::min(r, rows - 1);
    decode_e2m1_row(matrix.codes + row * (columns / 2), matrix.scale + row * (columns / kExpertGroup), columns,
                    out + r * columns);
  }
}

DSV4_VECTOR_CLONES void widen(const BFloat16* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

// (token, pick) by expert; those of expert e are entries begin[e] … begin[e + 1] - 1.
struct Routes {
  std::vector<int64_t> begin, entries, used;

  explicit Routes(const ExpertCall& call) : begin(call.experts + 1) {
    const int64_t n = call.tokens * call.k;
    for (int64_t i = 0; i < n; ++i) {
      if (call.picks[i] >= 0 && call.picks[i] < call.experts) ++begin[call.picks[i] + 1];
    }
    for (int64_t e = 0; e < call.experts; ++e) {
      if (begin[e + 1]) used.push_back(e);
      begin[e + 1] += begin[e];
    }
    entries.resize(begin[call.experts]);
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    for (int64_t i = 0; i < n; ++i) {
      if (call.picks[i] >= 0 && call.picks[i] < call.experts) entries[next[call.picks[i]]++] = i;
    }
  }
};

// body(expert, its entries, how many, first row, rows, rows at once) for blocks of rows of every expert in use.
template <typename Body>
void for_rows(ffi::ThreadPool& pool, const Routes& routes, int64_t rows, int64_t columns, const Body& body) {
  const int64_t experts = static_cast<int64_t>(routes.used.size());
  if (!experts) return;
  const int64_t per_expert = static_cast<int64_t>(routes.entries.size()) / experts;
  const int64_t at_once = rows_at_once(per_expert), blocks = (rows + at_once - 1) / at_once;
  const int64_t work = at_once * columns * (2 + per_expert / 2);
  parallel_for(pool, experts * blocks, std::max<int64_t>(1, kWorkPerChunk / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) {
                 std::unique_ptr<float[]> weights(new float[at_once * columns]);
                 std::vector<float> out;
                 std::vector<const float*> x;
                 for (int64_t item = begin; item < end; ++item) {
                   const int64_t expert = routes.used[item / blocks], first = item % blocks * at_once;
                   const int64_t from = routes.begin[expert], count = routes.begin[expert + 1] - from;
                   out.resize(2 * count * at_once), x.resize(count);
                   body(expert, routes.entries.data() + from, count, first, std::min(at_once, rows - first), at_once,
                        weights.get(), out.data(), x.data());
                 }
               });
}

ffi::Error experts(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, float limit) {
  ExpertCall call;
  const ffi::Error error = bind_experts(args, results, &call);
  if (error.failure()) return error;
  const float* x = static_cast<const float*>(call.x);
  std::unique_ptr<float[]> wide;
  if (!call.is_float) {
    wide.reset(new float[call.tokens * call.hidden]);
    widen(static_cast<const BFloat16*>(call.x), call.tokens * call.hidden, wide.get());
    x = wide.get();
  }
  const Routes routes(call);
  std::unique_ptr<float[]> inner(new float[call.tokens * call.k * call.inner]);
  for_rows(pool, routes, call.inner, call.hidden,
           [&](int64_t expert, const int64_t* entries, int64_t count, int64_t first, int64_t rows, int64_t at_once,
               float* weights, float* out, const float** of_entry) {
             for (int64_t i = 0; i < count; ++i) of_entry[i] = x + entries[i] / call.k * call.hidden;
             float *gate = out, *up = out + count * at_once;
             decode_rows(call.w1, expert * call.inner + first, rows, at_once, call.hidden, weights);
             row_products(weights, at_once, call.hidden, call.hidden, of_entry, count, gate);
             decode_rows(call.w3, expert * call.inner + first, rows, at_once, call.hidden, weights);
             row_products(weights, at_once, call.hidden, call.hidden, of_entry, count, up);
             for (int64_t i = 0; i < count; ++i) {
               for (int64_t r = 0; r < rows; ++r) {
                 float g = gate[i * at_once + r], u = up[i * at_once + r];
                 // So written, a NaN stays one.
                 g = g > limit ? limit : g;
                 u = u > limit ? limit : u < -limit ? -limit : u;
                 inner[entries[i] * call.inner + first + r] = g / (1.0f + std::exp(-g)) * u;
               }
             }
           });
  std::unique_ptr<float[]> each(new float[call.tokens * call.k * call.hidden]);
  for_rows(pool, routes, call.hidden, call.inner,
           [&](int64_t expert, const int64_t* entries, int64_t count, int64_t first, int64_t rows, int64_t at_once,
               float* weights, float* out, const float** of_entry) {
             for (int64_t i = 0; i < count; ++i) of_entry[i] = inner.get() + entries[i] * call.inner;
             decode_rows(call.w2, expert * call.hidden + first, rows, at_once, call.inner, weights);
             row_products(weights, at_once, call.inner, call.inner, of_entry, count, out);
             for (int64_t i = 0; i < count; ++i) {
               for (int64_t r = 0; r < rows; ++r) {
                 each[entries[i] * call.hidden + first + r] = out[i * at_once + r] * call.weights[entries[i]];
               }
             }
           });
  std::vector<float> sum(call.hidden);
  for (int64_t t = 0; t < call.tokens; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0f);
    for (int64_t i = t * call.k; i < (t + 1) * call.k; ++i) {
      if (call.picks[i] < 0 || call.picks[i] >= call.experts) continue;
      for (int64_t c = 0; c < call.hidden; ++c) sum[c] += each[i * call.hidden + c];
    }
    for (int64_t c = 0; c < call.hidden; ++c) {
      if (call.is_float) {
        static_cast<float*>(call.y)[t * call.hidden + c] = sum[c];
      } else {
        static_cast<BFloat16*>(call.y)[t * call.hidden + c] = to_bf16(sum[c]);
      }
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Experts);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Dsv4Experts, dsv4::experts,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<float>("limit"));
