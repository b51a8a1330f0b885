// append_swa on the GPU.
#include "append_swa/device.cuh"
#include "common/export.h"
#include "common/launched.h"

namespace dsv4 {
namespace {

constexpr int kThreads = 128, kTokensPerBlock = kThreads / 32;

template <typename T, bool kFused, bool kGrouped>
__global__ void __launch_bounds__(kThreads) append_swa_kernel(const AppendSwa call) {
  append_token<V4Record, T, kFused, kGrouped>(
      call, static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x / 32, threadIdx.x % 32);
}

// The grid depends on shapes alone: a CUDA graph may replay it.
template <typename T, bool kFused>
void launch(cudaStream_t stream, const AppendSwa& call) {
  const auto blocks = static_cast<unsigned>((call.tokens + kTokensPerBlock - 1) / kTokensPerBlock);
  const auto kernel = call.record.scales ? append_swa_kernel<T, kFused, true> : append_swa_kernel<T, kFused, false>;
  kernel<<<blocks, kThreads, 0, stream>>>(call);
}

template <bool kFused>
ffi::Error append(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps) {
  AppendSwa call;
  const ffi::Error error = bind_append_swa(args, results, layer, kFused, eps, &call);
  if (error.failure()) return error;
  if (const ffi::Error limit = supported_window<V4Record>("append_swa", call); limit.failure()) return limit;
  if (call.tokens == 0) return ffi::Error::Success();
  call.kv_is_float ? launch<float, kFused>(stream, call) : launch<BFloat16, kFused>(stream, call);
  return launched("append_swa", cudaGetLastError());
}

ffi::Error append_swa(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  return append<false>(stream, args, results, layer, 0.0f);
}

ffi::Error append_swa_fused(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps) {
  return append<true>(stream, args, results, layer, eps);
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4AppendSwa, dsv4::append_swa, .Attr<int64_t>("layer"));
DSV4_CUDA_HANDLER(Dsv4AppendSwaFused, dsv4::append_swa_fused, .Attr<int64_t>("layer").Attr<float>("eps"));
