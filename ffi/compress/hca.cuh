// HCA on the device: a window of 128 rows in eight slices of 64 channels, each a block of a cluster.
#ifndef DSV4_COMPRESS_HCA_CUH_
#define DSV4_COMPRESS_HCA_CUH_

#include <cooperative_groups.h>

#include "compress/device.cuh"

namespace dsv4 {

struct Hca {
  static constexpr int kRatio = 128, kLanes = 1, kDim = 512, kRopeDim = 64;
};

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
  const int64_t offset = call.tail_offset(segment.slot, segment.start, 0) + channel;
  store_four(call.ka + offset, own_k);
  store_four(call.za + offset, own_z);
}

// With kCluster the eight slices of a window are the eight blocks of a cluster, and the first finishes the entry;
// without, one block does them one after another.
template <typename T, bool kOneToken, bool kCluster>
__device__ __forceinline__ void take_slices(const Compress& call, const RecordRows& record, uint32_t shares,
                                            HcaScratch* scratch) {
  const uint32_t worker = kCluster ? blockIdx.x / kSlices : blockIdx.x;
  const int first_slice = kCluster ? blockIdx.x % kSlices : 0, last_slice = kCluster ? first_slice + 1 : kSlices;
  const int64_t s = kOneToken ? worker : worker / shares;
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
  Four own_k = {}, own_z = {};
#pragma unroll 1
  for (int slice = first_slice; slice < last_slice; ++slice) {
    if (!kCluster) load_own(slice);
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
    // In a cluster the pooled channels go first: the barrier would wait for the tail's writes too.
    if (window == 0 && !(kCluster && closes)) store_slice<T, kOneToken>(call, s, segment, slice, own_k, own_z);
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
    if (window == 0) store_slice<T, kOneToken>(call, s, segment, first_slice, own_k, own_z);
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

// How a kernel is launched in which the first blocks take windows, all slices of one in a cluster where there are
// clusters, and `others` blocks do something else.
struct SlicesLaunch {
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
    config.dynamicSmemBytes = sizeof(HcaScratch);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kSlices;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = has_clusters ? 1 : 0;
  }
};

}  // namespace dsv4

#endif  // DSV4_COMPRESS_HCA_CUH_
