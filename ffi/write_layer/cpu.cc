// write_layer on the CPU: its parts one after the other.
#include "common/export.h"
#include "write_layer/op.h"
#include "write_layer/workers.h"

namespace dsv4 {
namespace {

ffi::Error write_layer(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                       float eps, int64_t of_entries) {
  WriteLayer call;
  const ffi::Error error = bind_write_layer(args, results, layer, eps, of_entries, &call);
  if (error.failure()) return error;
  if (call.keys.segments) write_keys(pool, call.keys, call.key_rows);
  write_entries(pool, call.entries, call.record);
  write_tokens(pool, call.window);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4WriteLayer, dsv4::write_layer,
                 .Attr<int64_t>("layer").Attr<float>("eps").Attr<int64_t>("of_entries"));
