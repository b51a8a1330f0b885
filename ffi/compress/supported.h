// Which geometries the CUDA kernels of compress support.
#ifndef DSV4_COMPRESS_SUPPORTED_H_
#define DSV4_COMPRESS_SUPPORTED_H_

#include <string>

#include "compress/geometry.cuh"
#include "compress/op.h"

namespace dsv4 {

template <typename Geometry>
inline bool is(const Compress& call) {
  return call.ratio == Geometry::kRatio && call.lanes == Geometry::kLanes && call.dim == Geometry::kDim &&
         call.rope_dim == Geometry::Form::kRope;
}

inline ffi::Error unsupported(const char* op, const Compress& call, const char* supported) {
  return ffi::Error::InvalidArgument(std::string(op) + ": got ratio " + std::to_string(call.ratio) + ", " +
                                     std::to_string(call.lanes) + " lanes of " + std::to_string(call.dim) + ", " +
                                     std::to_string(call.rope_dim) + " rotated, on CUDA; expected " + supported + ".");
}

inline ffi::Error supported_entries(const char* op, const Compress& call, const RecordRows& record) {
  if (!is<Csa>(call) && !is<Hca>(call)) {
    return unsupported(op, call, "ratio 4 with 2 lanes or ratio 128 with 1, of 512, 64 rotated");
  }
  return supported_record<V4Record>(op, record);
}

inline ffi::Error supported_keys(const char* op, const Compress& call) {
  if (is<CsaIndexer>(call)) return ffi::Error::Success();
  return unsupported(op, call, "ratio 4 with 2 lanes of 128, 64 rotated");
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_SUPPORTED_H_
