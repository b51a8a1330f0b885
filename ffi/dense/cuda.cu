// multiply_each on CUDA: bfloat16 weights of one input, a few tokens. Contract and jax.numpy form:
// dsv4_jax/ops/nn/dense.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "common/operands.h"
#include "dense/product.cuh"

namespace dsv4 {
namespace {

constexpr int kMostWeights = 8, kMostTokens = 64;

struct DenseWeight {
  const __nv_bfloat16* w;  // (rows, columns)
  __nv_bfloat16* y;        // (T, rows)
  int first_block, rows;
};

struct DenseCall {
  const __nv_bfloat16* x;  // (T, columns)
  DenseWeight weights[kMostWeights];
  int number, tokens, columns;
};

// kPlaces: tokens by 8; kTiles: rows of a block by 16.
template <int kPlaces, int kTiles, int kAhead>
__global__ void __launch_bounds__(dense::kThreads) dense_kernel(const __grid_constant__ DenseCall call) {
  extern __shared__ __align__(16) uint8_t shared[];
  DenseWeight weight = call.weights[0];
#pragma unroll
  for (int i = 1; i < kMostWeights; ++i) {
    if (i < call.number && static_cast<int>(blockIdx.x) >= call.weights[i].first_block) weight = call.weights[i];
  }
  const int first_row = (blockIdx.x - weight.first_block) * 16 * kTiles;
  const auto store = [&](int token, int row, float sum) {
    weight.y[static_cast<int64_t>(token) * weight.rows + first_row + row] = __float2bfloat16_rn(sum);
  };
  dense::multiply_rows<kPlaces, kTiles, kAhead>(weight.w + static_cast<int64_t>(first_row) * call.columns, call.x,
                                                call.tokens, call.columns, shared, store, [] {});
}

template <int kPlaces, int kTiles, int kAhead>
cudaError_t run(DenseCall& call, cudaStream_t stream) {
  const auto kernel = dense_kernel<kPlaces, kTiles, kAhead>;
  const int shared = dense::shared_bytes<kPlaces, kTiles, kAhead>();
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  int blocks = 0;
  for (int i = 0; i < call.number; ++i) {
    call.weights[i].first_block = blocks;
    blocks += call.weights[i].rows / (16 * kTiles);
  }
  kernel<<<blocks, dense::kThreads, shared, stream>>>(call);
  return cudaGetLastError();
}

// Operands: x (T, K) and weights (N, K), bfloat16. Results: (T, N) for each, bfloat16.
ffi::Error dense_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results) {
  constexpr auto kBf16 = ffi::DataType::BF16;
  Operands operands("multiply_each", args);
  const Operands::Shape x = operands.shape_of_next();
  DenseCall call = {};
  if (x.size() != 2 || x[0] > kMostTokens || x[1] % (dense::kWarps * dense::kStep)) {
    operands.fail("x " + Operands::text(x), "(T up to 64, a multiple of 256)");
    return operands.error();
  }
  call.x = operands.take<const __nv_bfloat16>("x", {kBf16}, x);
  call.tokens = static_cast<int>(x[0]), call.columns = static_cast<int>(x[1]);
  while (operands.ok() && operands.left()) {
    const Operands::Shape shape = operands.shape_of_next();
    auto y = results.get<ffi::AnyBuffer>(call.number);
    if (call.number == kMostWeights || shape.size() != 2 || shape[0] % 32 || !y.has_value() ||
        (*y)->size_bytes() != static_cast<size_t>(2 * x[0] * shape[0])) {
      operands.fail("a weight " + Operands::text(shape), "up to 8, of a multiple of 32 rows, and a result for each");
      break;
    }
    DenseWeight& weight = call.weights[call.number++];
    weight.w = operands.take<const __nv_bfloat16>("weight", {kBf16}, {shape[0], x[1]});
    weight.y = static_cast<__nv_bfloat16*>((*y)->untyped_data()), weight.rows = static_cast<int>(shape[0]);
  }
  if (!operands.ok()) return operands.error();
  if (!call.tokens || !call.number) return ffi::Error::Success();
  return launched("multiply_each", call.tokens <= 8    ? run<1, 1, 8>(call, stream)
                                   : call.tokens <= 16 ? run<2, 1, 8>(call, stream)
                                   : call.tokens <= 32 ? run<4, 2, 4>(call, stream)
                                                       : run<8, 2, 4>(call, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Dense);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Dsv4Dense, dsv4::dense_on_device,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(),
    {xla::ffi::Traits::kCmdBufferCompatible});
