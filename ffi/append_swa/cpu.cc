// append_swa on the CPU.
#include <vector>

#include "append_swa/op.h"
#include "common/export.h"
#include "common/parallel_for.h"
#include "formats/quantise.h"
#include "math/rms_norm_rope.h"
#include "write_layer/workers.h"

namespace dsv4 {
namespace {

constexpr int64_t kTokensPerChunk = 32;

template <typename T>
void write_row(const AppendSwa& call, const T* kv, int64_t row) {
  uint8_t* nope = call.record.nope + row * call.nope_width;
  if (call.record.scales) {
    quantise_row_by_groups(kv, call.nope_width, nope, call.record.scales + row * call.record.scale_width, call.record.scale_width);
  } else {
    call.record.inv_scale[row] = quantise_row(kv, call.nope_width, nope);
  }
  BFloat16* rope = call.record.rope + row * call.rope_width;
  for (int64_t i = 0; i < call.rope_width; ++i) rope[i] = to_bf16(to_float(kv[call.nope_width + i]));
}

template <typename T>
void append_tokens(const AppendSwa& call, int64_t begin, int64_t end) {
  const int64_t width = call.nope_width + call.rope_width, half = call.rope_width / 2;
  std::vector<float> values(call.norm ? width : 0);
  RmsNormRope rms_norm_rope;
  for (int64_t t = begin; t < end; ++t) {
    const int32_t role = call.role_of[t], slot = call.slot_of[t], position = call.position_of[t];
    const int64_t row = call.row_of(role, slot, position);
    if (row < 0) continue;
    const T* kv = static_cast<const T*>(call.kv) + t * width;
    if (call.norm) {
      for (int64_t i = 0; i < width; ++i) values[i] = to_float(kv[i]);
      rms_norm_rope(values.data(), width, call.rope_width, call.norm, call.cos + t * half, call.sin + t * half, call.eps);
      write_row(call, values.data(), row);
    } else {
      write_row(call, kv, row);
    }
    call.pos[row] = position;
    if (role == kWritesRowAndHead) call.head[slot] = call.next_row(position);
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

DSV4_EXPORT_HANDLER(Dsv4AppendSwa);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Dsv4AppendSwa, dsv4::append_swa,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::ThreadPool>().RemainingArgs().RemainingRets().Attr<int64_t>("layer"));
DSV4_EXPORT_HANDLER(Dsv4AppendSwaFused);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4AppendSwaFused, dsv4::append_swa_fused,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"));
