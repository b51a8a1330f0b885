// sinkhorn on the CPU. Contract and jax.numpy form: dsv4_jax/ops/nn/sinkhorn.py.
#include <cstring>

#include "common/export.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {
namespace {

namespace ffi = xla::ffi;

// Divides every line of n values, `step` apart, by its sum + eps; lines begin `line` apart.
void normalise(float* x, int64_t n, int64_t line, int64_t step, float eps) {
  for (int64_t i = 0; i < n; ++i) {
    float sum = 0.0f;
    for (int64_t j = 0; j < n; ++j) sum += x[i * line + j * step];
    sum += eps;
    for (int64_t j = 0; j < n; ++j) x[i * line + j * step] /= sum;
  }
}

ffi::Error sinkhorn(ffi::Buffer<ffi::F32> matrices, ffi::ResultBuffer<ffi::F32> result, int64_t iterations, float eps) {
  const auto shape = matrices.dimensions();
  if (shape.size() != 3 || shape[1] != shape[2]) {
    return ffi::Error::InvalidArgument("sinkhorn: got matrices of another shape; expected (T, n, n).");
  }
  const int64_t n = shape[1];
  std::memcpy(result->typed_data(), matrices.typed_data(), matrices.size_bytes());
  for (int64_t t = 0; t < shape[0]; ++t) {
    float* x = result->typed_data() + t * n * n;
    normalise(x, n, 1, n, eps);
    for (int64_t i = 1; i < iterations; ++i) {
      normalise(x, n, n, 1, eps);
      normalise(x, n, 1, n, eps);
    }
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Sinkhorn);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Sinkhorn, dsv4::sinkhorn,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("iterations")
                                  .Attr<float>("eps"));
