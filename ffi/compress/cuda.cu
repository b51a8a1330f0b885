// compress on the GPU. Several tokens a segment: CSA with one window a block of 128 threads, HCA with one window a cluster
// of blocks. One token a segment: compress_decode.cuh. A running tail: compress_running.cuh.
#include "common/export.h"
#include "common/launched.h"
#include "compress/decode.cuh"
#include "compress/running.cuh"
#include "compress/supported.h"

namespace dsv4 {
namespace {

__device__ __forceinline__ void write_entry(const RecordRows& record, int64_t row, int thread, const Four& v,
                                            FinishScratch<4>* scratch) {
  write_record(record, row, thread, v, scratch);
}
__device__ __forceinline__ void write_entry(const KeyRows& keys, int64_t row, int thread, const Four& v,
                                            FinishScratch<1>*) {
  write_key(keys, row, thread, v);
}

// The share of a segment's work that a worker has: with kMixed the windows that may need the tail and the tail, with
// kTokens one other window.
//
// Overlapped windows of eight rows: kDim / 4 threads pool a whole window, each its own four channels.
template <typename T, typename Geometry, int kWorkers, Source kSource, typename Pool>
__device__ __forceinline__ void overlapped_windows(const Compress& call, const Pool& pool, int64_t s, int first, int last,
                                                   const Segment& segment, float4* slots) {
  constexpr int kThreads = Geometry::kDim / kChannels;
  __shared__ FinishScratch<kThreads / 32> scratch[kWorkers];
  FinishScratch<kThreads / 32>* shared = &scratch[threadIdx.x / kThreads];
  const int thread = threadIdx.x % kThreads, channel = thread * kChannels;
#pragma unroll 1
  for (int window = first; window < last; ++window) {
    const int64_t entry = call.first_entry(segment) + window;
    if (window >= call.windows || !call.closes(segment, entry)) break;
    EightRows<T, Geometry, kThreads * kWorkers, kSource> rows;
    rows.k = slots + threadIdx.x;
    EntryConstants constants;
    constants.template load<Geometry::kDim, Geometry::kRopeDim>(call, s * call.windows + window, thread);
    const int64_t row = call.entry_row(segment.slot, entry);
    rows.load(call, s, segment, entry, 0, channel, {}, {});
    const Four top = largest(rows);
    wait_for_copies();
    Four weights, sums, pooled;
    weigh(rows, top, &weights, &sums);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) pooled.x[c] = divide(sums.x[c], weights.x[c]);
    normalise<Geometry::kDim, Geometry::kRopeDim>(call, constants, thread, &pooled, shared);
    if (row >= 0) write_entry(pool, row, thread, pooled, shared);
    if (last - first > 1) sync_group<kThreads>(0);  // the scratch is free again
  }
}

template <typename T, typename Geometry, int kWorkers, typename Pool>
__global__ void __launch_bounds__(Geometry::kDim / kChannels * kWorkers, 768 / (Geometry::kDim / kChannels * kWorkers))
    overlapped_kernel(const __grid_constant__ Compress call, const __grid_constant__ Pool pool, const uint32_t shares) {
  constexpr int kThreads = Geometry::kDim / kChannels;
  __shared__ float4 slots[kRows * kThreads * kWorkers];
  const int thread = threadIdx.x % kThreads, channel = thread * kChannels;
  const uint32_t worker = blockIdx.x * kWorkers + threadIdx.x / kThreads;
  const int64_t s = worker / shares;
  if (s >= call.segments) return;
  const int share = static_cast<int>(worker - static_cast<uint32_t>(s) * shares);
  const Segment segment = call.segment(s);
  if (segment.count == 0) return;
  if (share > 0) {
    overlapped_windows<T, Geometry, kWorkers, Source::kTokens>(call, pool, s, share + 1, share + 2, segment, slots);
    return;
  }
  overlapped_windows<T, Geometry, kWorkers, Source::kMixed>(call, pool, s, 0, 2, segment, slots);
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) store_tail_lane<T, Geometry>(call, s, segment, lane, channel, 0, 1);
}

template <typename T, typename Geometry, int kWorkers, typename Pool>
cudaError_t launch_overlapped(const Compress& call, const Pool& pool, cudaStream_t stream) {
  constexpr int kThreads = Geometry::kDim / kChannels * kWorkers;
  const int64_t shares = workers_per_segment(call);
  const auto blocks = static_cast<unsigned>((call.segments * shares + kWorkers - 1) / kWorkers);
  overlapped_kernel<T, Geometry, kWorkers, Pool>
      <<<blocks, kThreads, 0, stream>>>(call, pool, static_cast<uint32_t>(shares));
  return cudaGetLastError();
}

template <typename T, bool kOneToken, bool kCluster>
__global__ void __launch_bounds__(kHcaThreads, kCluster ? 4 : 2)
    hca_kernel(const __grid_constant__ Compress call, const __grid_constant__ RecordRows record, const uint32_t shares) {
  extern __shared__ float4 dynamic[];
  take_slices<T, kOneToken, kCluster>(call, record, shares, reinterpret_cast<HcaScratch*>(dynamic));
}

template <typename T>
cudaError_t launch_hca(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  const int64_t shares = workers_per_segment(call);
  const SlicesLaunch launch(stream, call.segments * shares, 0);
  const bool one = call.width == 1;
  const auto kernel = launch.has_clusters ? (one ? hca_kernel<T, true, true> : hca_kernel<T, false, true>)
                                          : (one ? hca_kernel<T, true, false> : hca_kernel<T, false, false>);
  return cudaLaunchKernelEx(&launch.config, kernel, call, record, static_cast<uint32_t>(shares));
}

ffi::Error compress(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps) {
  Compress call;
  RecordRows record;
  bool kv_is_float;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record, &kv_is_float);
  if (error.failure()) return error;
  if (const ffi::Error limit = supported_entries("compress", call, record); limit.failure()) return limit;
  if (call.segments == 0) return ffi::Error::Success();
  const FinishRecord finish = {record};
  if (call.sums) {
    return launched("compress", kv_is_float ? launch_running<float>(call, finish, stream)
                                            : launch_running<BFloat16>(call, finish, stream));
  }
  if (is<Csa>(call) && call.width == 1) {
    return launched("compress", kv_is_float ? launch_overlapped_decode<float, Csa>(call, finish, stream)
                                            : launch_overlapped_decode<BFloat16, Csa>(call, finish, stream));
  }
  if (is<Csa>(call)) {
    return launched("compress", kv_is_float ? launch_overlapped<float, Csa, 1>(call, record, stream)
                                            : launch_overlapped<BFloat16, Csa, 1>(call, record, stream));
  }
  return launched("compress", kv_is_float ? launch_hca<float>(call, record, stream)
                                          : launch_hca<BFloat16>(call, record, stream));
}

template <typename T>
cudaError_t launch_indexer(const Compress& call, const KeyRows& keys, cudaStream_t stream) {
  if (call.width == 1) return launch_overlapped_decode<T, CsaIndexer>(call, FinishKey{keys}, stream);
  // Few windows: spread them over the GPU.
  return call.segments * workers_per_segment(call) <= 1024 ? launch_overlapped<T, CsaIndexer, 1>(call, keys, stream)
                                                           : launch_overlapped<T, CsaIndexer, 4>(call, keys, stream);
}

ffi::Error compress_indexer(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps, bool rotate) {
  Compress call;
  KeyRows keys;
  bool kv_is_float;
  const ffi::Error error = bind_compress_indexer(args, results, layer, eps, rotate, &call, &keys, &kv_is_float);
  if (error.failure()) return error;
  if (const ffi::Error limit = supported_keys("compress_indexer", call); limit.failure()) return limit;
  if (call.segments == 0) return ffi::Error::Success();
  return launched("compress_indexer",
                  kv_is_float ? launch_indexer<float>(call, keys, stream) : launch_indexer<BFloat16>(call, keys, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Compress);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Compress, dsv4::compress,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
DSV4_EXPORT_HANDLER(Dsv4CompressIndexer);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4CompressIndexer, dsv4::compress_indexer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps")
                                  .Attr<bool>("rotate"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
