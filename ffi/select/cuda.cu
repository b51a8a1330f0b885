// select on the GPU: compute capability 9.0.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "select/launch.cuh"

namespace dsv4 {
namespace {

ffi::Error select(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results,
                  const SelectAttributes& attributes) {
  SelectCall call;
  const ffi::Error error = bind_select(args, results, attributes, &call);
  if (error.failure()) return error;
  const std::string limit = select_sm90::limit_of(call);
  if (!limit.empty()) return ffi::Error::InvalidArgument("select: got " + limit + ".");
  return launched("select", select_sm90::launch(stream, call));
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4Select, dsv4::select, .Attrs<dsv4::SelectAttributes>());
