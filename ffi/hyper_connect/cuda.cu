// hyper_connect on Hopper GPUs. Contract and jax.numpy form: dsv4_jax/ops/nn/hyper_connect.py.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "common/operands.h"
#include "hyper_connect/kernel.cuh"
#include "hyper_connect/many_tokens.cuh"

namespace dsv4 {

struct HyperConnectAttributes {
  int64_t update_parts;  // operands of an update: 0, 3 or 4
  int64_t head;          // 1: of the head
  int64_t iterations;    // of Sinkhorn's
  float hc_eps, rms_eps;
};

}  // namespace dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dsv4::HyperConnectAttributes, xla::ffi::StructMember<int64_t>("update_parts"),
                                      xla::ffi::StructMember<int64_t>("head"),
                                      xla::ffi::StructMember<int64_t>("iterations"),
                                      xla::ffi::StructMember<float>("hc_eps"),
                                      xla::ffi::StructMember<float>("rms_eps"));

namespace dsv4 {
namespace {

namespace kernels = hyper_connect;

constexpr int kMany = 512;  // tokens from which thread blocks of 16 are faster

template <int kTokens, bool kStaged>
cudaError_t run(const kernels::Call& call, cudaStream_t stream) {
  const auto kernel = kernels::hyper_connect_kernel<kTokens, kStaged>;
  const int shared = kernels::shared_bytes<kTokens, kStaged>(call.dim, call.rows);
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  const int blocks = (call.tokens + kTokens - 1) / kTokens * kernels::kCluster;
  kernel<<<blocks, call.dim / kernels::kCluster + kernels::kWarp, shared, stream>>>(call);
  return cudaGetLastError();
}

template <int kTiles>
cudaError_t run_many(const kernels::Call& call, cudaStream_t stream) {
  const auto kernel = kernels::many_tokens_kernel<kTiles>;
  const int shared = kernels::many_shared(call.dim);
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  const int blocks = (call.tokens + kernels::kManyTokens - 1) / kernels::kManyTokens;
  kernel<<<blocks, kernels::kManyThreads, shared, stream>>>(call);
  return cudaGetLastError();
}

// A few tokens have a cluster each; of more some share what is read of `fn`.
cudaError_t run(const kernels::Call& call, cudaStream_t stream) {
  if (call.tokens >= kMany) return call.rows > 8 ? run_many<3>(call, stream) : run_many<1>(call, stream);
  return call.tokens <= 8 ? run<1, true>(call, stream) : run<4, false>(call, stream);
}

template <typename T>
T* result_data(ffi::RemainingRets results, size_t at, size_t count, Operands& operands) {
  auto result = results.get<ffi::AnyBuffer>(at);
  if (result.has_value() && (*result)->size_bytes() == count * sizeof(T))
    return static_cast<T*>((*result)->untyped_data());
  operands.fail("result " + std::to_string(at) + " of another size", std::to_string(count) + " values");
  return nullptr;
}

// Operands: streams (T, n, d); of an update output (T, d), post (T, n), comb (T, n, n) and, as a fourth part, what is
// added to the output (T, d); fn, base, scale, norm (d).
// Results: with an update the new streams; x (T, d); but of the head post and comb.
ffi::Error hyper_connect_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results,
                                   const HyperConnectAttributes& attributes) {
  const int64_t update_parts = attributes.update_parts;
  const bool head = attributes.head != 0;
  Operands operands("hyper_connect", args);
  const Operands::Shape shape = operands.shape_of_next();
  if (shape.size() != 3 || shape[1] != kernels::kStreams || shape[2] % 512 ||
      shape[2] < kernels::kLeastColumns * kernels::kCluster || shape[2] > kernels::kMostColumns * kernels::kCluster) {
    operands.fail("streams " + Operands::text(shape), "(T, 4, d), d a multiple of 512 from 3584 to 7168");
    return operands.error();
  }
  constexpr int64_t n = kernels::kStreams;
  const int64_t tokens = shape[0], dim = shape[2], rows = head ? n : kernels::kMixes;
  constexpr auto kBf16 = ffi::DataType::BF16, kF32 = ffi::DataType::F32;
  kernels::Call call = {};
  call.streams = operands.take<const __nv_bfloat16>("streams", {kBf16}, shape);
  if (update_parts) {
    call.output = operands.take<const __nv_bfloat16>("output", {kBf16}, {tokens, dim});
    call.old_post = operands.take<const float>("post", {kF32}, {tokens, n});
    call.old_comb = operands.take<const float>("comb", {kF32}, {tokens, n, n});
    if (update_parts > 3) call.extra = operands.take<const __nv_bfloat16>("extra", {kBf16}, {tokens, dim});
  }
  call.fn = operands.take<const float>("fn", {kF32}, {rows, n * dim});
  call.base = operands.take<const float>("base", {kF32}, {rows});
  call.scale = operands.take<const float>("scale", {kF32}, {head ? 1 : 3});
  call.norm = operands.take<const float>("norm", {kF32}, {dim});
  size_t at = 0;
  if (update_parts) call.new_streams = result_data<__nv_bfloat16>(results, at++, tokens * n * dim, operands);
  call.x = result_data<__nv_bfloat16>(results, at++, tokens * dim, operands);
  if (!head) {
    call.post = result_data<float>(results, at++, tokens * n, operands);
    call.comb = result_data<float>(results, at++, tokens * n * n, operands);
  }
  if (!operands.ok()) return operands.error();
  if (!tokens) return ffi::Error::Success();
  call.tokens = static_cast<int>(tokens), call.dim = static_cast<int>(dim);
  call.rows = static_cast<int>(rows), call.iterations = static_cast<int>(attributes.iterations);
  call.hc_eps = attributes.hc_eps, call.rms_eps = attributes.rms_eps;
  call.of_values = 1.0f / static_cast<float>(n * dim), call.of_columns = 1.0f / static_cast<float>(dim);
  return launched("hyper_connect", run(call, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4HyperConnect, dsv4::hyper_connect_on_device, .Attrs<dsv4::HyperConnectAttributes>());
