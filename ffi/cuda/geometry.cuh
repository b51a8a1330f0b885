// The sizes that device code is compiled for, and how a vector lies in the registers of threads. Records of other sizes
// are another RecordForm: kernels take the form as a template's argument.
#ifndef DSV4_CUDA_GEOMETRY_CUH_
#define DSV4_CUDA_GEOMETRY_CUH_

#include <cuda_runtime.h>

#include <string>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

// A record of kNopeValues in FP8 and kRopeValues in bfloat16. Its scale is one float, or a byte for every kScaleGroup
// values.
template <int kNopeValues, int kRopeValues, int kScaleGroup>
struct RecordForm {
  static constexpr int kNope = kNopeValues, kRope = kRopeValues, kDim = kNope + kRope, kGroup = kScaleGroup;
  static constexpr int kScales = (kNope / kGroup + 7) / 8 * 8;  // bytes stored, those of padding included
  static_assert(kNope % kGroup == 0 && kRope % 2 == 0, "whole groups and pairs");
};

using V4Record = RecordForm<448, 64, 64>;

// A key of the indexer.
template <int kKeyValues, int kRopeValues>
struct KeyForm {
  static constexpr int kDim = kKeyValues, kRope = kRopeValues, kNope = kDim - kRope;
};

using V4Key = KeyForm<128, 64>;

// An error unless these records are of the form.
template <typename Form, typename Records>
inline xla::ffi::Error supported_record(const char* op, const Records& record) {
  const auto error = [&](const std::string& got, const std::string& expected) {
    return xla::ffi::Error::InvalidArgument(std::string(op) + ": got " + got + "; expected " + expected + " on CUDA.");
  };
  if (record.nope_width != Form::kNope || record.rope_width != Form::kRope) {
    return error(
        "records of " + std::to_string(record.nope_width) + " + " + std::to_string(record.rope_width) + " values",
        std::to_string(Form::kNope) + " + " + std::to_string(Form::kRope));
  }
  if (record.scale_width != 0 && record.scale_width != Form::kScales) {
    return error(std::to_string(record.scale_width) + " scales a record", std::to_string(Form::kScales));
  }
  return xla::ffi::Error::Success();
}

// A vector in the registers of kThreadsOf threads: thread t has pieces of kVectorOf neighbouring channels, piece p from
// channel (p * kThreads + t) * kVector on. kBarrierOf: the hardware barrier of these threads, 0 that of the block.
template <int kDimOf, int kThreadsOf, int kVectorOf, int kBarrierOf = 0>
struct Spread {
  static constexpr int kDim = kDimOf, kThreads = kThreadsOf, kVector = kVectorOf, kBarrier = kBarrierOf;
  static constexpr int kWarps = kThreads / 32, kPieces = kDim / (kThreads * kVector);
  static_assert(kThreads % 32 == 0 && kPieces * kThreads * kVector == kDim, "every thread has whole pieces");

  static __device__ __forceinline__ int channel(int piece, int thread) { return (piece * kThreads + thread) * kVector; }
};

}  // namespace dsv4

#endif  // DSV4_CUDA_GEOMETRY_CUH_
