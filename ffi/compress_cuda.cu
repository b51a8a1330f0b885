// compress on the GPU. Several tokens a segment: CSA with one window a block of 128 threads, HCA with one window a cluster
// of blocks. One token a segment: compress_decode.cuh. A running tail: compress_running.cuh.
#include <cooperative_groups.h>

#include "compress_decode.cuh"
#include "compress_device.cuh"
#include "compress_running.cuh"
#include "export.h"

namespace dsv4 {
namespace {

struct Csa {
  static constexpr int kRatio = 4, kLanes = 2, kDim = 512, kRopeDim = 64;
};
struct CsaIndexer {
  static constexpr int kRatio = 4, kLanes = 2, kDim = 128, kRopeDim = 64;
};
struct Hca {
  static constexpr int kRatio = 128, kLanes = 1, kDim = 512, kRopeDim = 64;
};

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
    if (last - first > 1) sync_first<kThreads>();  // the scratch is free again
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

// Long windows: 16 threads with four channels each pool eight rows, 16 such groups a window's 64 channels: a slice.
constexpr int kSlices = 8, kSliceDim = 64, kQuads = kSliceDim / kChannels, kHcaThreads = 256, kHcaWarps = kHcaThreads / 32;

struct HcaScratch {  // less than the 48 KiB a block gets unasked
  float4 slots[kRows * kHcaThreads];
  float pooled[Hca::kDim];
  float top[kHcaWarps][kSliceDim], weights[kHcaWarps][kSliceDim], sums[kHcaWarps][kSliceDim];
  FinishScratch<4> finish;
};

__device__ __forceinline__ Four shuffle_xor(const Four& v, int step) {
  Four other;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) other.x[c] = __shfl_xor_sync(0xFFFFFFFFu, v.x[c], step);
  return other;
}

__device__ __forceinline__ float add_pairs(const float (&x)[kHcaWarps][kSliceDim], int channel) {
  return ((x[0][channel] + x[1][channel]) + (x[2][channel] + x[3][channel])) +
         ((x[4][channel] + x[5][channel]) + (x[6][channel] + x[7][channel]));
}

// Pools 64 channels of a window and hands them to store(channel within the slice, value), in the first 64 threads. All
// threads have read what they need of the tail when it returns.
template <typename T, Source kSource, typename Store>
__device__ __forceinline__ void pool_slice(const Compress& call, int64_t s, const Segment& segment, int64_t entry,
                                           int slice, const Four& own_k, const Four& own_z, HcaScratch* scratch,
                                           const Store& store) {
  const int thread = threadIdx.x, warp = thread / 32, quad = thread % kQuads, first = thread / kQuads * kRows;
  const int channel = slice * kSliceDim + quad * kChannels;
  EightRows<T, Hca, kHcaThreads, kSource> rows;
  rows.k = scratch->slots + thread;
  rows.load(call, s, segment, entry, first, channel, own_k, own_z);
  Four top = largest(rows);
  const Four other_top = shuffle_xor(top, kQuads);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) top.x[c] = larger(top.x[c], other_top.x[c]);
  if (thread % 32 < kQuads) store_four(&scratch->top[warp][quad * kChannels], top);
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kHcaWarps; ++w) {
    const Four other = load_four(&scratch->top[w][quad * kChannels]);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) top.x[c] = larger(top.x[c], other.x[c]);
  }
  Four weights, sums;
  wait_for_copies();
  weigh(rows, top, &weights, &sums);
  weights = add(weights, shuffle_xor(weights, kQuads));
  sums = add(sums, shuffle_xor(sums, kQuads));
  if (thread % 32 < kQuads) {
    store_four(&scratch->weights[warp][quad * kChannels], weights);
    store_four(&scratch->sums[warp][quad * kChannels], sums);
  }
  __syncthreads();
  if (thread < kSliceDim) store(thread, divide(add_pairs(scratch->sums, thread), add_pairs(scratch->weights, thread)));
}

// Writes a slice of the segment's newest tokens into the tail.
template <typename T, bool kOneToken>
__device__ __forceinline__ void store_slice(const Compress& call, int64_t s, const Segment& segment, int slice,
                                            const Four& own_k, const Four& own_z) {
  const int channel = slice * kSliceDim + static_cast<int>(threadIdx.x) % kQuads * kChannels;
  const int group = threadIdx.x / kQuads;
  if (!kOneToken) return store_tail_lane<T, Hca>(call, s, segment, 0, channel, group, kHcaThreads / kQuads);
  if (group != kHcaThreads / kQuads - 1) return;  // those that hold the token
  const int64_t offset = call.tail_offset(segment.slot, segment.start, call.rows_a) + channel;
  store_four(call.ka + offset, own_k);
  store_four(call.za + offset, own_z);
}

// With kCluster the eight slices of a window are the eight blocks of a cluster, and the first finishes the entry;
// without, one block does them one after another.
template <typename T, bool kOneToken, bool kCluster>
__global__ void __launch_bounds__(kHcaThreads, kCluster ? 4 : 2)
    hca_kernel(const __grid_constant__ Compress call, const __grid_constant__ RecordRows record, const uint32_t shares) {
  extern __shared__ float4 dynamic[];
  HcaScratch* scratch = reinterpret_cast<HcaScratch*>(dynamic);
  const uint32_t worker = kCluster ? blockIdx.x / kSlices : blockIdx.x;
  const int first_slice = kCluster ? blockIdx.x % kSlices : 0, last_slice = kCluster ? first_slice + 1 : kSlices;
  const int64_t s = worker / shares;
  const int window = static_cast<int>(worker - static_cast<uint32_t>(s) * shares);  // the first also has the tail
  const bool holds_own = kOneToken && threadIdx.x >= kHcaThreads - kQuads;
  FreshLane<T> own;
  const auto load_own = [&](int slice) {
    if (holds_own) own.load(call, s, 1, 0, Hca::kDim, slice * kSliceDim + threadIdx.x % kQuads * kChannels);
  };
  if (kCluster) load_own(first_slice);
  const Segment segment = call.segment(s);
  const int64_t entry = call.first_entry(segment) + window;
  const bool closes = segment.count > 0 && call.closes(segment, entry);
  if (segment.count == 0 || (!closes && window > 0)) return;

#if __CUDA_ARCH__ >= 900
  if (kCluster && closes) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
#pragma unroll 1
  for (int slice = first_slice; slice < last_slice; ++slice) {
    if (!kCluster) load_own(slice);
    Four own_k = {}, own_z = {};
    if (holds_own) {
      own_k = own.k();
      own_z = own.z(ape_of<Hca>(call, segment.start, 0, slice * kSliceDim + threadIdx.x % kQuads * kChannels));
    }
    const auto store = [&](int channel, float value) {
      float* to = &scratch->pooled[slice * kSliceDim + channel];
#if __CUDA_ARCH__ >= 900
      if (kCluster) {
        asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // the first block has started
        to = cooperative_groups::this_cluster().map_shared_rank(to, 0);
      }
#endif
      *to = value;
    };
    if (closes) {
      if (kOneToken) {
        pool_slice<T, Source::kTailAndOwn>(call, s, segment, entry, slice, own_k, own_z, scratch, store);
      } else if (window > 0) {
        pool_slice<T, Source::kTokens>(call, s, segment, entry, slice, own_k, own_z, scratch, store);
      } else {
        pool_slice<T, Source::kMixed>(call, s, segment, entry, slice, own_k, own_z, scratch, store);
      }
#if __CUDA_ARCH__ >= 900
      if (kCluster && threadIdx.x >= kSliceDim) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
#endif
    }
    if (window == 0) store_slice<T, kOneToken>(call, s, segment, slice, own_k, own_z);
  }
  if (!closes) return;
  EntryConstants constants;
  int64_t row = -1;
  const bool finishes = first_slice == 0 && threadIdx.x < 128;
  if (finishes) {
    constants.load<Hca::kDim, Hca::kRopeDim>(call, s * call.windows + window, threadIdx.x);
    row = call.entry_row(segment.slot, entry);
  }
#if __CUDA_ARCH__ >= 900
  if (kCluster) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    if (first_slice != 0) return;
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  }
#endif
  __syncthreads();
  if (!finishes) return;
  Four v = load_four(&scratch->pooled[threadIdx.x * kChannels]);
  normalise<Hca::kDim, Hca::kRopeDim>(call, constants, threadIdx.x, &v, &scratch->finish);
  if (row >= 0) write_record(record, row, threadIdx.x, v, &scratch->finish);
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

template <typename T>
cudaError_t launch_hca(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  const int64_t shares = workers_per_segment(call);
  int device = 0, has_clusters = 0;
  if (const cudaError_t status = cudaGetDevice(&device); status != cudaSuccess) return status;
  cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
  const bool one = call.width == 1;
  cudaLaunchConfig_t config = {};
  config.blockDim = kHcaThreads;
  config.stream = stream;
  config.dynamicSmemBytes = sizeof(HcaScratch);
  config.gridDim = static_cast<unsigned>(call.segments * shares * (has_clusters ? kSlices : 1));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = kSlices;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = has_clusters ? 1 : 0;
  const auto kernel = has_clusters ? (one ? hca_kernel<T, true, true> : hca_kernel<T, false, true>)
                                   : (one ? hca_kernel<T, true, false> : hca_kernel<T, false, false>);
  return cudaLaunchKernelEx(&config, kernel, call, record, static_cast<uint32_t>(shares));
}

ffi::Error result_of(const char* op, cudaError_t status) {
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string(op) + ": the kernel was not launched: " + cudaGetErrorString(status));
}

template <typename Geometry>
bool is(const Compress& call) {
  return call.ratio == Geometry::kRatio && call.lanes == Geometry::kLanes && call.dim == Geometry::kDim &&
         call.rope_dim == Geometry::kRopeDim;
}

ffi::Error unsupported(const char* op, const Compress& call, const char* supported) {
  return ffi::Error::InvalidArgument(std::string(op) + ": got ratio " + std::to_string(call.ratio) + ", " +
                                     std::to_string(call.lanes) + " lanes of " + std::to_string(call.dim) + ", " +
                                     std::to_string(call.rope_dim) + " rotated, on CUDA; expected " + supported + ".");
}

ffi::Error compress(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps) {
  Compress call;
  RecordRows record;
  bool kv_is_float;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record, &kv_is_float);
  if (error.failure()) return error;
  if (!is<Csa>(call) && !is<Hca>(call)) {
    return unsupported("compress", call, "ratio 4 with 2 lanes or ratio 128 with 1, of 512, 64 rotated");
  }
  if (record.scales && record.scale_width != 8) {
    return ffi::Error::InvalidArgument("compress: got " + std::to_string(record.scale_width) +
                                       " scales a record; expected 8 on CUDA.");
  }
  if (call.segments == 0) return ffi::Error::Success();
  if (call.sums) {
    return result_of("compress", kv_is_float ? launch_running<float>(call, record, stream)
                                             : launch_running<BFloat16>(call, record, stream));
  }
  if (is<Csa>(call) && call.width == 1) {
    const FinishRecord finish = {record};
    return result_of("compress", kv_is_float ? launch_overlapped_decode<float, Csa>(call, finish, stream)
                                             : launch_overlapped_decode<BFloat16, Csa>(call, finish, stream));
  }
  if (is<Csa>(call)) {
    return result_of("compress", kv_is_float ? launch_overlapped<float, Csa, 1>(call, record, stream)
                                             : launch_overlapped<BFloat16, Csa, 1>(call, record, stream));
  }
  return result_of("compress", kv_is_float ? launch_hca<float>(call, record, stream)
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
  if (!is<CsaIndexer>(call)) return unsupported("compress_indexer", call, "ratio 4 with 2 lanes of 128, 64 rotated");
  if (call.segments == 0) return ffi::Error::Success();
  return result_of("compress_indexer",
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
