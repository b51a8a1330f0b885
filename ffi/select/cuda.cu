// select on the GPU: compute capability 9.0.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "select/launch.cuh"

namespace dsv4 {
namespace {

ffi::Error select(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                  int64_t ratio, int64_t k, int64_t max_entries, int64_t raw) {
  SelectCall call;
  const ffi::Error error = bind_select(args, results, layer, ratio, k, max_entries, raw != 0, &call);
  if (error.failure()) return error;
  const std::string limit = select_sm90::limit_of(call);
  if (!limit.empty()) return ffi::Error::InvalidArgument("select: got " + limit + ".");
  return launched("select", select_sm90::launch(stream, call));
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Select);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Select, dsv4::select,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("ratio")
                                  .Attr<int64_t>("k")
                                  .Attr<int64_t>("max_entries")
                                  .Attr<int64_t>("raw"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
