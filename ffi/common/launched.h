// What a handler returns after a launch.
#ifndef DSV4_COMMON_LAUNCHED_H_
#define DSV4_COMMON_LAUNCHED_H_

#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

inline xla::ffi::Error launched(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string(op) + ": the kernel was not launched: " + cudaGetErrorString(status));
}

}  // namespace dsv4

#endif  // DSV4_COMMON_LAUNCHED_H_
