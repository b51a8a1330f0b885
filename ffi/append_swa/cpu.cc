// append_swa on the CPU.
#include <vector>

#include "append_swa/op.h"
#include "common/export.h"
#include "common/parallel_for.h"
#include "formats/record_rows.h"
#include "math/rms_norm_rope.h"
#include "write_layer/workers.h"

namespace dsv4 {
namespace {

constexpr int64_t kTokensPerChunk = 32;

template <typename T>
void append_tokens(const AppendSwa& call, int64_t begin, int64_t end) {
  const int64_t width = call.record.width(), rope_width = call.record.rope_width, half = rope_width / 2;
  std::vector<float> values(call.norm ? width : 0);
  RmsNormRope rms_norm_rope;
  for (int64_t t = begin; t < end; ++t) {
    TokenPlace place = call.look_up(t);
    place.row = call.row_of(place);
    if (place.row < 0) continue;
    const T* kv = static_cast<const T*>(call.kv) + t * width;
    if (call.norm) {
      for (int64_t i = 0; i < width; ++i) values[i] = to_float(kv[i]);
      rms_norm_rope(values.data(), width, rope_width, call.norm, call.cos + t * half, call.sin + t * half, call.eps);
      write_record(call.record, place.row, values.data());
    } else {
      write_record(call.record, place.row, kv);
    }
    call.enter(place);
  }
}

}  // namespace

void write_tokens(ffi::ThreadPool& pool, const AppendSwa& call) {
  parallel_for(pool, call.tokens, kTokensPerChunk, [&](int64_t begin, int64_t end) {
    call.kv_is_float ? append_tokens<float>(call, begin, end) : append_tokens<BFloat16>(call, begin, end);
  });
}

namespace {

ffi::Error append(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, bool fused,
                  float eps) {
  AppendSwa call;
  const ffi::Error error = bind_append_swa(args, results, layer, fused, eps, &call);
  if (error.failure()) return error;
  write_tokens(pool, call);
  return ffi::Error::Success();
}

ffi::Error append_swa(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  return append(pool, args, results, layer, false, 0.0f);
}

ffi::Error append_swa_fused(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps) {
  return append(pool, args, results, layer, true, eps);
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4AppendSwa, dsv4::append_swa, .Attr<int64_t>("layer"));
DSV4_CPU_HANDLER(Dsv4AppendSwaFused, dsv4::append_swa_fused, .Attr<int64_t>("layer").Attr<float>("eps"));
