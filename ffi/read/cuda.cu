// read_window, read_entries and read_keys on the GPU: one warp a vector, or four where there are many.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "cuda/geometry.cuh"
#include "read/op.h"
#include "read/reader.cuh"

namespace dsv4 {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int64_t kFewVectors = 8192;  // up to here a warp each fills the chip no more than once

// `parts` blocks read the vectors of a request, kInFlight in every warp.
template <typename InWarp, int kInFlight, typename Call, typename Rows>
__global__ void __launch_bounds__(kThreads) read_kernel(const Call call, const Rows rows, unsigned parts) {
  const int lane = threadIdx.x % 32;
  const unsigned request = blockIdx.x / parts;
  const int64_t first = (static_cast<int64_t>(blockIdx.x - request * parts) * kWarps + threadIdx.x / 32) * kInFlight;
  // The rows are found by a lane each.
  int64_t found = -1;
  if (lane < kInFlight && first + lane < call.per_request) found = rows.row(request, first + lane);
  InWarp vectors[kInFlight];
  bool exists[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t row = __shfl_sync(0xFFFFFFFFu, found, i);
    exists[i] = row >= 0;
    if (exists[i]) vectors[i].load(call, row, lane);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i < call.per_request) {
      vectors[i].store(call, static_cast<int64_t>(request) * call.per_request + first + i, lane, exists[i]);
    }
  }
}

template <typename InWarp, int kInFlight, typename Call, typename Rows>
ffi::Error launch(cudaStream_t stream, const Call& call, const Rows& rows) {
  // The grid depends on shapes alone: a CUDA graph may replay it.
  const int64_t parts = (call.per_request + kWarps * kInFlight - 1) / (kWarps * kInFlight);
  if (call.requests * parts > INT32_MAX) {
    return ffi::Error::InvalidArgument("read: got " + std::to_string(call.vectors()) +
                                       " vectors; expected some 2^33 at most in one call.");
  }
  read_kernel<InWarp, kInFlight>
      <<<static_cast<unsigned>(call.requests * parts), kThreads, 0, stream>>>(call, rows, static_cast<unsigned>(parts));
  return launched("read", cudaGetLastError());
}

template <typename InWarp, typename Call, typename Rows>
ffi::Error read_all(cudaStream_t stream, const Call& call, const Rows& rows) {
  if (call.vectors() == 0) return ffi::Error::Success();
  return call.vectors() <= kFewVectors ? launch<InWarp, 1>(stream, call, rows) : launch<InWarp, 4>(stream, call, rows);
}

template <typename Rows>
ffi::Error read_records(cudaStream_t stream, const ReadRecords& call, const Rows& rows) {
  if (ffi::Error limit = supported_record<V4Record>("read", call); limit.failure()) return limit;
  if (call.scale_width == 0) {
    return call.out_is_float ? read_all<RecordInWarp<V4Record, float, float>>(stream, call, rows)
                             : read_all<RecordInWarp<V4Record, float, BFloat16>>(stream, call, rows);
  }
  return call.out_is_float ? read_all<RecordInWarp<V4Record, uint8_t, float>>(stream, call, rows)
                           : read_all<RecordInWarp<V4Record, uint8_t, BFloat16>>(stream, call, rows);
}

ffi::Error read_window(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                       int64_t window) {
  ReadRecords call;
  WindowRows rows;
  const ffi::Error error = bind_read_window(args, results, layer, window, &call, &rows);
  return error.success() ? read_records(stream, call, rows) : error;
}

ffi::Error read_entries(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadRecords call;
  EntryRows rows;
  const ffi::Error error = bind_read_entries(args, results, layer, &call, &rows);
  return error.success() ? read_records(stream, call, rows) : error;
}

ffi::Error read_keys(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadKeys call;
  EntryRows rows;
  const ffi::Error error = bind_read_keys(args, results, layer, &call, &rows);
  if (error.failure()) return error;
  if (call.dim != V4Key::kDim) {
    return ffi::Error::InvalidArgument("read_keys: got keys of " + std::to_string(call.dim) + " values; expected " +
                                       std::to_string(V4Key::kDim) + " on CUDA.");
  }
  return call.group == 16 ? read_all<KeyInWarp<V4Key, 16>>(stream, call, rows)
                          : read_all<KeyInWarp<V4Key, 32>>(stream, call, rows);
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4ReadWindow, dsv4::read_window, .Attr<int64_t>("layer").Attr<int64_t>("window"));
DSV4_CUDA_HANDLER(Dsv4ReadEntries, dsv4::read_entries, .Attr<int64_t>("layer"));
DSV4_CUDA_HANDLER(Dsv4ReadKeys, dsv4::read_keys, .Attr<int64_t>("layer"));
