// set_rows on the CPU: rows of any dtype copied into an array in place. Contract: dsv4_jax/ops/write/rows.py.
#include <cstring>
#include <string>

#include "common/export.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {
namespace {

namespace ffi = xla::ffi;

// array (n_0, …, n_{k-1}, row…), indices (T, k), values (T, row…).
ffi::Error set_rows(ffi::AnyBuffer array, ffi::Buffer<ffi::S32> indices, ffi::AnyBuffer values,
                    ffi::Result<ffi::AnyBuffer> result) {
  const auto shape = array.dimensions(), index_shape = indices.dimensions(), value_shape = values.dimensions();
  const bool ranks_fit = index_shape.size() == 2 && index_shape[1] <= static_cast<int64_t>(shape.size()) &&
                         value_shape.size() == shape.size() - static_cast<size_t>(index_shape[1]) + 1;
  bool fits = ranks_fit && value_shape[0] == index_shape[0] && array.element_type() == values.element_type();
  const size_t leading = ranks_fit ? static_cast<size_t>(index_shape[1]) : 0;
  size_t row_bytes = ffi::ByteWidth(array.element_type());
  for (size_t i = leading; fits && i < shape.size(); ++i) {
    fits = shape[i] == value_shape[i - leading + 1];
    row_bytes *= static_cast<size_t>(shape[i]);
  }
  if (!fits) {
    return ffi::Error::InvalidArgument(
        "set_rows: got array, indices and values that do not fit; expected (n_0, ..., n_k-1, *row), (T, k) and "
        "(T, *row), array and values of one dtype.");
  }
  if (array.untyped_data() != result->untyped_data()) {
    return ffi::Error::Internal("set_rows: the array and its result are different buffers; they must alias.");
  }
  for (int64_t t = 0; t < index_shape[0]; ++t) {
    const int32_t* index = indices.typed_data() + t * static_cast<int64_t>(leading);
    size_t row = 0;
    bool inside = true;
    for (size_t i = 0; i < leading; ++i) {
      inside = inside && index[i] >= 0 && index[i] < shape[i];
      row = row * static_cast<size_t>(shape[i]) + static_cast<size_t>(index[i]);
    }
    if (!inside) continue;
    std::memcpy(static_cast<char*>(array.untyped_data()) + row * row_bytes,
                static_cast<const char*>(values.untyped_data()) + static_cast<size_t>(t) * row_bytes, row_bytes);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4SetRows);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4SetRows, dsv4::set_rows,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>());
