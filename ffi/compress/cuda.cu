// compress on the GPU. Several tokens a segment: CSA with one window a block of 128 threads, HCA with one window a
// cluster of blocks. One token a segment: decode.cuh. A running tail: running.cuh.
#include "common/export.h"
#include "common/launched.h"
#include "compress/decode.cuh"
#include "compress/finish.cuh"
#include "compress/hca.cuh"
#include "compress/running.cuh"
#include "compress/supported.h"

namespace dsv4 {
namespace {

// The share of a segment's work that a worker has: with kMixed the windows that may need the tail and the tail, with
// kTokens one other window.
//
// Overlapped windows of eight rows: kDim / 4 threads pool a whole window, each its own four channels.
template <typename T, typename Geometry, int kWorkers, Source kSource, typename Finish>
__device__ __forceinline__ void overlapped_windows(const Compress& call, const Finish& finish, WindowOf at, int first,
                                                   int last, float4* slots) {
  constexpr int kThreads = Finish::kThreads;
  __shared__ typename Finish::Scratch scratch[kWorkers];
  const int thread = threadIdx.x % kThreads, channel = thread * kChannels;
#pragma unroll 1
  for (int window = first; window < last; ++window) {
    at.entry = call.first_entry(at.segment) + window;
    if (window >= call.windows || !call.closes(at.segment, at.entry)) break;
    EightRows<T, Geometry, kThreads * kWorkers, kSource> rows;
    rows.k = slots + threadIdx.x;
    typename Finish::Constants constants;
    Finish::load(call, at.s * call.windows + window, thread, &constants);
    const int64_t row = call.entry_row(at.segment.slot, at.entry);
    rows.load(call, at, 0, channel, {});
    const Four top = largest(rows);
    wait_for_copies();
    Four weights, sums, pooled;
    weigh(rows, top, &weights, &sums);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) pooled.x[c] = divide(sums.x[c], weights.x[c]);
    if (row >= 0) finish(call, constants, row, thread, pooled.x, &scratch[threadIdx.x / kThreads]);
    if (last - first > 1) sync_threads_of<typename Finish::Layout>();  // the scratch is free again
  }
}

template <typename T, typename Geometry, int kWorkers, typename Finish>
__global__ void __launch_bounds__(Finish::kThreads* kWorkers, 768 / (Finish::kThreads * kWorkers))
    overlapped_kernel(const __grid_constant__ Compress call, const __grid_constant__ Finish finish,
                      const uint32_t shares) {
  constexpr int kThreads = Finish::kThreads;
  static_assert(Geometry::kRatio * Geometry::kLanes == kRows && Geometry::kDim == kThreads * kChannels,
                "a thread's share");
  __shared__ float4 slots[kRows * kThreads * kWorkers];
  const uint32_t worker = blockIdx.x * kWorkers + threadIdx.x / kThreads;
  const int64_t s = worker / shares;
  if (s >= call.segments) return;
  const int share = static_cast<int>(worker - static_cast<uint32_t>(s) * shares);
  const WindowOf at = {s, call.segment(s), 0};
  if (at.segment.count == 0) return;
  if (share > 0) {
    overlapped_windows<T, Geometry, kWorkers, Source::kTokens>(call, finish, at, share + 1, share + 2, slots);
    return;
  }
  overlapped_windows<T, Geometry, kWorkers, Source::kMixed>(call, finish, at, 0, 2, slots);
  const int channel = threadIdx.x % kThreads * kChannels;
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) store_tail_lane<T, Geometry>(call, at, lane, channel, 0, 1);
}

template <typename T, typename Geometry, int kWorkers, typename Finish>
cudaError_t launch_overlapped(const Compress& call, const Finish& finish, cudaStream_t stream) {
  constexpr int kThreads = Finish::kThreads * kWorkers;
  const int64_t shares = workers_per_segment(call);
  const auto blocks = static_cast<unsigned>((call.segments * shares + kWorkers - 1) / kWorkers);
  overlapped_kernel<T, Geometry, kWorkers, Finish>
      <<<blocks, kThreads, 0, stream>>>(call, finish, static_cast<uint32_t>(shares));
  return cudaGetLastError();
}

template <typename T, typename Geometry, bool kOneToken, bool kCluster>
__global__ void __launch_bounds__(kHcaThreads, kCluster ? 4 : 2)
    hca_kernel(const __grid_constant__ Compress call, const __grid_constant__ RecordRows record,
               const uint32_t shares) {
  extern __shared__ float4 dynamic[];
  take_slices<T, Geometry, kOneToken, kCluster>(call, record, shares, reinterpret_cast<HcaScratch<Geometry>*>(dynamic));
}

template <typename T, typename Geometry>
cudaError_t launch_hca(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  const int64_t shares = workers_per_segment(call);
  const SlicesLaunch<Geometry> launch(stream, call.segments * shares, 0);
  const bool one = call.width == 1;
  const auto kernel = launch.has_clusters
                          ? (one ? hca_kernel<T, Geometry, true, true> : hca_kernel<T, Geometry, false, true>)
                          : (one ? hca_kernel<T, Geometry, true, false> : hca_kernel<T, Geometry, false, false>);
  return cudaLaunchKernelEx(&launch.config, kernel, call, record, static_cast<uint32_t>(shares));
}

// One layer's entries of T.
template <typename T>
cudaError_t launch_entries(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  if (call.sums) return launch_running<T, Hca>(call, record, stream);
  if (!is<Csa>(call)) return launch_hca<T, Hca>(call, record, stream);
  if (call.width == 1) return launch_overlapped_decode<T, Csa>(call, FinishRecordInBlock<V4Record>{record}, stream);
  return launch_overlapped<T, Csa, 1>(call, FinishRecordInQuads<V4Record>{record}, stream);
}

ffi::Error compress(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                    float eps) {
  Compress call;
  RecordRows record;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record);
  if (error.failure()) return error;
  if (const ffi::Error limit = supported_entries("compress", call, record); limit.failure()) return limit;
  if (call.segments == 0) return ffi::Error::Success();
  return launched("compress", call.kv_is_float ? launch_entries<float>(call, record, stream)
                                               : launch_entries<BFloat16>(call, record, stream));
}

template <typename T>
cudaError_t launch_indexer(const Compress& call, const KeyRows& keys, cudaStream_t stream) {
  const FinishKey<V4Key> finish = {keys};
  if (call.width == 1) return launch_overlapped_decode<T, CsaIndexer>(call, FinishKeyOfPairs<V4Key>{finish}, stream);
  // Few windows: spread them over the GPU.
  return call.segments * workers_per_segment(call) <= 1024 ? launch_overlapped<T, CsaIndexer, 1>(call, finish, stream)
                                                           : launch_overlapped<T, CsaIndexer, 4>(call, finish, stream);
}

ffi::Error compress_indexer(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps, bool rotate) {
  Compress call;
  KeyRows keys;
  const ffi::Error error = bind_compress_indexer(args, results, layer, eps, rotate, &call, &keys);
  if (error.failure()) return error;
  if (const ffi::Error limit = supported_keys("compress_indexer", call); limit.failure()) return limit;
  if (call.segments == 0) return ffi::Error::Success();
  return launched("compress_indexer", call.kv_is_float ? launch_indexer<float>(call, keys, stream)
                                                       : launch_indexer<BFloat16>(call, keys, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4Compress, dsv4::compress, .Attr<int64_t>("layer").Attr<float>("eps"));
DSV4_CUDA_HANDLER(Dsv4CompressIndexer, dsv4::compress_indexer,
                  .Attr<int64_t>("layer").Attr<float>("eps").Attr<bool>("rotate"));
