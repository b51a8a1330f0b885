// HCA on the device: a window of 128 rows in eight slices of 64 channels, each a block of a cluster.
#ifndef DSV4_COMPRESS_HCA_CUH_
#define DSV4_COMPRESS_HCA_CUH_

#include <cooperative_groups.h>

#include "compress/device.cuh"
#include "compress/finish.cuh"

namespace dsv4 {

// Long windows: 16 threads with four channels each pool eight rows, 16 such groups a window's 64 channels: a slice.
constexpr int kSliceDim = 64, kQuads = kSliceDim / kChannels, kHcaThreads = 256, kHcaWarps = kHcaThreads / 32;

template <typename Geometry>
constexpr int kSlices = Geometry::kDim / kSliceDim;

template <typename Geometry>
struct HcaScratch {  // less than the 48 KiB a block gets unasked
  float4 slots[kRows * kHcaThreads];
  float pooled[Geometry::kDim];
  float top[kHcaWarps][kSliceDim], weights[kHcaWarps][kSliceDim], sums[kHcaWarps][kSliceDim];
  typename FinishRecordInQuads<typename Geometry::Form>::Scratch finish;
};

__device__ __forceinline__ Four shuffle_xor(const Four& v, int step) {
  Four other;
#pragma unroll
  for (int c = 0; c < kChannels; ++c) other.x[c] = __shfl_xor_sync(0xFFFFFFFFu, v.x[c], step);
  return other;
}

__device__ __forceinline__ float add_warps(const float (&x)[kHcaWarps][kSliceDim], int channel) {
  float of_warps[kHcaWarps];
#pragma unroll
  for (int w = 0; w < kHcaWarps; ++w) of_warps[w] = x[w][channel];
  return add_pairs(of_warps);
}

// Pools 64 channels of a window and hands them to store(channel within the slice, value), in the first 64 threads. All
// threads have read what they need of the tail when it returns.
template <typename T, typename Geometry, Source kSource, typename Store>
__device__ __forceinline__ void pool_slice(const Compress& call, const WindowOf& window, int slice, const OwnToken& own,
                                           HcaScratch<Geometry>* scratch, const Store& store) {
  const int thread = threadIdx.x, warp = thread / 32, quad = thread % kQuads, first = thread / kQuads * kRows;
  const int channel = slice * kSliceDim + quad * kChannels;
  EightRows<T, Geometry, kHcaThreads, kSource> rows;
  rows.k = scratch->slots + thread;
  rows.load(call, window, first, channel, own);
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
  if (thread < kSliceDim) store(thread, divide(add_warps(scratch->sums, thread), add_warps(scratch->weights, thread)));
}

// Writes a slice of the segment's newest tokens into the tail.
template <typename T, typename Geometry, bool kOneToken>
__device__ __forceinline__ void store_slice(const Compress& call, const WindowOf& window, int slice,
                                            const OwnToken& own) {
  const Segment& segment = window.segment;
  const int channel = slice * kSliceDim + static_cast<int>(threadIdx.x) % kQuads * kChannels;
  const int group = threadIdx.x / kQuads;
  if (!kOneToken) return store_tail_lane<T, Geometry>(call, window, 0, channel, group, kHcaThreads / kQuads);
  if (group != kHcaThreads / kQuads - 1) return;  // those that hold the token
  const int64_t offset = call.tail_offset(segment.slot, segment.start, 0) + channel;
  store_four(call.ka + offset, own.k);
  store_four(call.za + offset, own.z);
}

// With kCluster the eight slices of a window are the eight blocks of a cluster, and the first finishes the entry;
// without, one block does them one after another.
template <typename T, typename Geometry, bool kOneToken, bool kCluster>
__device__ __forceinline__ void take_slices(const Compress& call, const RecordRows& record, uint32_t shares,
                                            HcaScratch<Geometry>* scratch) {
  using Finish = FinishRecordInQuads<typename Geometry::Form>;
  constexpr int kSlices = dsv4::kSlices<Geometry>;
  const uint32_t worker = kCluster ? blockIdx.x / kSlices : blockIdx.x;
  const int first_slice = kCluster ? blockIdx.x % kSlices : 0, last_slice = kCluster ? first_slice + 1 : kSlices;
  const int64_t s = kOneToken ? worker : worker / shares;
  const int window = static_cast<int>(worker - static_cast<uint32_t>(s) * shares);  // the first also has the tail
  const bool holds_own = kOneToken && threadIdx.x >= kHcaThreads - kQuads;
  FreshLane<T> fresh;
  const auto load_own = [&](int slice) {
    if (holds_own) fresh.load(call, s, 1, 0, Geometry::kDim, slice * kSliceDim + threadIdx.x % kQuads * kChannels);
  };
  if (kCluster) load_own(first_slice);
  const Segment segment = call.segment(s);
  const int64_t entry = call.first_entry(segment) + window;
  const WindowOf at = {s, segment, entry};
  const bool closes = segment.count > 0 && call.closes(segment, entry);
  if (segment.count == 0 || (!closes && window > 0)) return;

#if __CUDA_ARCH__ >= 900
  if (kCluster && closes) ptx::cluster_arrive_relaxed();
#endif
  OwnToken own = {};
#pragma unroll 1
  for (int slice = first_slice; slice < last_slice; ++slice) {
    if (!kCluster) load_own(slice);
    if (holds_own) {
      own.k = fresh.k();
      own.z = fresh.z(ape_of<Geometry>(call, segment.start, 0, slice * kSliceDim + threadIdx.x % kQuads * kChannels));
    }
    const auto store = [&](int channel, float value) {
      float* to = &scratch->pooled[slice * kSliceDim + channel];
#if __CUDA_ARCH__ >= 900
      if (kCluster) {
        ptx::cluster_wait();  // the first block has started
        to = cooperative_groups::this_cluster().map_shared_rank(to, 0);
      }
#endif
      *to = value;
    };
    if (closes) {
      if (kOneToken) {
        pool_slice<T, Geometry, Source::kTailAndOwn>(call, at, slice, own, scratch, store);
      } else if (window > 0) {
        pool_slice<T, Geometry, Source::kTokens>(call, at, slice, own, scratch, store);
      } else {
        pool_slice<T, Geometry, Source::kMixed>(call, at, slice, own, scratch, store);
      }
#if __CUDA_ARCH__ >= 900
      if (kCluster && threadIdx.x >= kSliceDim) ptx::cluster_wait();
#endif
    }
    // In a cluster the pooled channels go first: the barrier would wait for the tail's writes too.
    if (window == 0 && !(kCluster && closes)) store_slice<T, Geometry, kOneToken>(call, at, slice, own);
  }
  if (!closes) return;
  typename Finish::Constants constants;
  int64_t row = -1;
  const bool finishes = first_slice == 0 && threadIdx.x < Finish::kThreads;
  if (finishes) {
    Finish::load(call, s * call.windows + window, threadIdx.x, &constants);
    row = call.entry_row(segment.slot, entry);
  }
#if __CUDA_ARCH__ >= 900
  if (kCluster) {
    ptx::cluster_arrive();
    if (window == 0) store_slice<T, Geometry, kOneToken>(call, at, first_slice, own);
    if (first_slice != 0) return;
    ptx::cluster_wait();
  }
#endif
  __syncthreads();
  if (!finishes || row < 0) return;
  const Four pooled = load_four(&scratch->pooled[threadIdx.x * kChannels]);
  Finish{record}(call, constants, row, threadIdx.x, pooled.x, &scratch->finish);
}

// How a kernel is launched in which the first blocks take windows, all slices of one in a cluster where there are
// clusters, and `others` blocks do something else.
template <typename Geometry>
struct SlicesLaunch {
  static constexpr int kSlices = dsv4::kSlices<Geometry>;
  static_assert(kSlices <= 8, "the blocks of a portable cluster");
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};
  int has_clusters = 0;
  uint32_t window_blocks = 0;

  SlicesLaunch(const SlicesLaunch&) = delete;
  SlicesLaunch(cudaStream_t stream, int64_t windows, int64_t others) {
    int device = 0;
    if (cudaGetDevice(&device) == cudaSuccess) {
      cudaDeviceGetAttribute(&has_clusters, cudaDevAttrClusterLaunch, device);
    }
    const int64_t of_cluster = has_clusters ? kSlices : 1;
    window_blocks = static_cast<uint32_t>(windows * of_cluster);
    config.gridDim = static_cast<unsigned>(window_blocks + (others + of_cluster - 1) / of_cluster * of_cluster);
    config.blockDim = kHcaThreads;
    config.stream = stream;
    config.dynamicSmemBytes = sizeof(HcaScratch<Geometry>);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kSlices;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = has_clusters ? 1 : 0;
  }
};

}  // namespace dsv4

#endif  // DSV4_COMPRESS_HCA_CUH_
