// apply_experts on Hopper GPUs. Contract and jax.numpy form: dsv4_jax/ops/nn/experts.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "common/export.h"
#include "common/launched.h"
#include "experts/few_tokens.cuh"
#include "experts/many_tokens.cuh"
#include "experts/op.h"

namespace dsv4 {
namespace {

namespace kernels = experts;

constexpr int kBlocks = 132;         // of the persistent kernels: one for each of a Hopper's multiprocessors
constexpr int64_t kFewTokens = 400;  // up to which reading weights once for every eight tokens of an expert is faster
constexpr int kHidden = 4096, kInner = 2048;  // the sizes that the kernels for few tokens are made for: V4-Flash

// Takes parts of the scratch result.
class Scratch {
 public:
  explicit Scratch(void* data) : data_(static_cast<uint8_t*>(data)) {}
  template <typename T>
  T* take(int64_t n) {
    T* part = reinterpret_cast<T*>(data_ + used_);
    used_ += (n * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return part;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* data_;
  int64_t used_ = 0;
};

template <typename Kernel>
cudaError_t launch(Kernel kernel, dim3 grid, int threads, int shared, cudaStream_t stream, bool overlap,
                   const void* call) {
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute, config.numAttrs = overlap ? 1 : 0;
  void* arguments[] = {const_cast<void*>(call)};
  return cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), arguments);
}

ffi::Error experts_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, float limit) {
  ExpertCall call;
  const ffi::Error error = bind_experts(args, results, &call);
  if (error.failure()) return error;
  if (call.is_float || call.hidden % 512 || call.inner % 512 || !(limit > 0.0f) || limit > 64.0f) {
    return ffi::Error::InvalidArgument(
        "apply_experts: on CUDA expected bfloat16, sizes that are multiples of 512 and a "
        "limit of at most 64.");
  }
  if (!call.tokens || !call.k)
    return launched("apply_experts", cudaMemsetAsync(call.y, 0, call.tokens * call.hidden * 2, stream));
  const bool is_few = call.tokens <= kFewTokens && call.hidden == kHidden && call.inner == kInner;
  const int64_t entries = call.tokens * call.k;

  auto result = results.get<ffi::AnyBuffer>(1);
  if (!result.has_value()) return ffi::Error::InvalidArgument("apply_experts: got no scratch; expected one.");
  Scratch scratch((*result)->untyped_data());
  kernels::ManyCall many = {};
  kernels::Call& c = many.call;
  const int64_t pieces = kernels::most_pieces(entries, call.experts),
                places = kernels::most_places(entries, call.experts);
  int32_t *slots, *expert_of, *begin, *list, *tiles, *totals, *piece_of, *place_entries;
  kernels::Piece* piece_list;
  float *inverse, *shares;
  if (is_few) {
    slots = scratch.take<int32_t>(1);
    expert_of = scratch.take<int32_t>(call.experts);
    begin = scratch.take<int32_t>(call.experts + 1);
    list = scratch.take<int32_t>(entries);
    tiles = scratch.take<int32_t>(1 + 2 * (std::min(call.experts, entries) + entries / kernels::kPieceTokens));
    c.inner = scratch.take<__half>(entries * call.inner);
    c.each = scratch.take<float>(entries * call.hidden);
  } else {
    totals = scratch.take<int32_t>(2);
    piece_list = scratch.take<kernels::Piece>(pieces);
    piece_of = scratch.take<int32_t>(places / 16);
    place_entries = scratch.take<int32_t>(places);
    inverse = scratch.take<float>(places);
    shares = scratch.take<float>(places);
    many.inner_images = scratch.take<uint8_t>(places * call.inner * 2);
    // When down writes what each expert gives, the tokens have been read.
    many.images = scratch.take<uint8_t>(std::max(places * 2, entries * 4) * call.hidden);
    c.each = reinterpret_cast<float*>(many.images);
    many.totals = totals, many.pieces = piece_list, many.entries = place_entries, many.inverse = inverse,
    many.shares = shares;
  }
  if (scratch.used() > static_cast<int64_t>((*result)->size_bytes())) {
    return ffi::Error::InvalidArgument("apply_experts: got scratch of " + std::to_string((*result)->size_bytes()) +
                                       " bytes; expected " + std::to_string(scratch.used()) + ".");
  }
  c.x = static_cast<const __nv_bfloat16*>(call.x), c.picks = call.picks, c.weights = call.weights;
  c.w1 = {call.w1.codes, call.w1.scale}, c.w2 = {call.w2.codes, call.w2.scale}, c.w3 = {call.w3.codes, call.w3.scale};
  c.out = static_cast<__nv_bfloat16*>(call.y);
  c.experts = static_cast<int>(call.experts), c.tokens = static_cast<int>(call.tokens), c.k = static_cast<int>(call.k);
  c.hidden = static_cast<int>(call.hidden), c.inner_size = static_cast<int>(call.inner);
  c.limit = limit;
  // |silu(gate) * up| stays below limit^2: as large as halves take.
  c.inner_scale = std::exp2(std::floor(std::log2(32768.0f / (limit * limit))));

  if (is_few && call.tokens > 1) {
    c.routes = {slots, expert_of, begin, list, tiles};
    kernels::route_kernel<<<1, 1024, (2 * call.experts + 1) * 4, stream>>>(
        call.picks, static_cast<int>(entries), c.experts, slots, expert_of, begin, list, tiles, kernels::kPieceTokens);
  }
  cudaError_t status;
  if (is_few) {
    constexpr int kWarpgroups = 2, kStages = 3;
    status = launch(kernels::few_kernel<true, kHidden, kInner, kStages, kWarpgroups>, kBlocks,
                    kWarpgroups * 128 + kernels::kProducers, kernels::Layout<kHidden, kStages, kWarpgroups>::kShared,
                    stream, call.tokens > 1, &c);
    if (status == cudaSuccess) {
      status = launch(kernels::few_kernel<false, kInner, kHidden, kStages, kWarpgroups>, kBlocks,
                      kWarpgroups * 128 + kernels::kProducers, kernels::Layout<kInner, kStages, kWarpgroups>::kShared,
                      stream, true, &c);
    }
  } else {
    kernels::plan_kernel<<<1, 1024, 4 * call.experts * 4, stream>>>(call.picks, static_cast<int>(entries), c.experts,
                                                                    totals, piece_list, piece_of, place_entries);
    kernels::image_kernel<<<static_cast<unsigned>(places / 8), 256, 0, stream>>>(
        c.x, c.k, c.hidden, totals, piece_list, piece_of, place_entries, c.weights, c.inner_scale, many.images, inverse,
        shares);
    status = launch(kernels::many_tokens_kernel<false>, kBlocks, kernels::kManyThreads,
                    kernels::ManyLayout<false>(c.hidden).bytes, stream, false, &many);
    if (status == cudaSuccess) {
      status = launch(kernels::many_tokens_kernel<true>, kBlocks, kernels::kManyThreads,
                      kernels::ManyLayout<true>(c.inner_size).bytes, stream, false, &many);
    }
  }
  if (status == cudaSuccess) {
    status = launch(kernels::sum_picks_kernel, dim3((c.hidden + 1023) / 1024, c.tokens), 256, 0, stream, is_few, &c);
  }
  return launched("apply_experts", status);
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Experts);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Dsv4Experts, dsv4::experts_on_device,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets().Attr<float>(
        "limit"),
    {xla::ffi::Traits::kCmdBufferCompatible});
