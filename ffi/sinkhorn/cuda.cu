// sinkhorn on the GPU: a lane a value, sums in the CPU's order and so its bits. Contract: dsv4_jax/ops/nn/sinkhorn.py.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {
namespace {

namespace ffi = xla::ffi;

constexpr int kThreads = 64, kWarp = 32;

// A warp holds as many matrices as fit; lane j * N + k of a matrix has its value [j, k].
template <int N>
__global__ void sinkhorn_kernel(const float* matrices, float* result, int64_t count, int iterations, float eps) {
  constexpr int kSize = N * N, kInWarp = kWarp / kSize;
  const int lane = threadIdx.x % kWarp, of_warp = lane / kSize, i = lane % kSize;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  const int64_t matrix = warp * kInWarp + of_warp;
  const bool holds = of_warp < kInWarp && matrix < count;
  float x = holds ? matrices[matrix * kSize + i] : 1.0f;

  auto normalise = [&](int first, int step) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < N; ++j) sum += __shfl_sync(~0u, x, first + j * step);
    x /= sum + eps;
  };
  const int base = min(of_warp, kInWarp - 1) * kSize, column = base + i % N, row = base + i / N * N;
  normalise(column, N);
  for (int k = 1; k < iterations; ++k) {
    normalise(row, 1);
    normalise(column, N);
  }
  if (holds) result[matrix * kSize + i] = x;
}

template <int N>
void launch(cudaStream_t stream, const float* matrices, float* result, int64_t count, int iterations, float eps) {
  constexpr int kInBlock = kThreads / kWarp * (kWarp / (N * N));
  sinkhorn_kernel<N><<<static_cast<unsigned>((count + kInBlock - 1) / kInBlock), kThreads, 0, stream>>>(
      matrices, result, count, iterations, eps);
}

ffi::Error sinkhorn(cudaStream_t stream, ffi::Buffer<ffi::F32> matrices, ffi::ResultBuffer<ffi::F32> result,
                    int64_t iterations, float eps) {
  const auto shape = matrices.dimensions();
  if (shape.size() != 3 || shape[1] != shape[2] || shape[1] < 1 || shape[1] > 5) {
    return ffi::Error::InvalidArgument("sinkhorn: got matrices of another shape; expected (T, n, n), n from 1 to 5.");
  }
  if (shape[0] == 0) return ffi::Error::Success();
  using Launch = void (*)(cudaStream_t, const float*, float*, int64_t, int, float);
  constexpr Launch kLaunch[] = {launch<1>, launch<2>, launch<3>, launch<4>, launch<5>};
  kLaunch[shape[1] - 1](stream, matrices.typed_data(), result->typed_data(), shape[0], static_cast<int>(iterations),
                        eps);
  return launched("sinkhorn", cudaGetLastError());
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Sinkhorn);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Sinkhorn, dsv4::sinkhorn,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("iterations")
                                  .Attr<float>("eps"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
