// compress with a running tail on the GPU: a block of 256 threads, each with two neighbouring channels, takes a segment's
// tokens of a window in order.
#ifndef DSV4_COMPRESS_RUNNING_CUH_
#define DSV4_COMPRESS_RUNNING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress.h"
#include "entry_of_pairs.cuh"
#include "running_sums.h"

namespace dsv4 {

constexpr int kRunningRatio = 128, kRunningThreads = 256;  // two channels each

// Two channels of a token: kv, and gate with ape added.
template <typename T>
struct PairOfToken {
  Pair<T> kv, gate;
  float2 ape;

  __device__ __forceinline__ void load(const Compress& call, int64_t token, int channel) {
    kv.load(call.kv, token * kEntryDim + channel);
    gate.load(call.gate, token * kEntryDim + channel);
  }
  __device__ __forceinline__ void load_ape(const Compress& call, uint32_t offset, int channel) {  // within the window
    ape = __ldg(reinterpret_cast<const float2*>(call.ape + offset * kEntryDim + channel));
  }
  __device__ __forceinline__ float2 k() const { return kv.values(); }
  __device__ __forceinline__ float2 z() const {
    const float2 raw = gate.values();
    return make_float2(raw.x + ape.x, raw.y + ape.y);
  }
};

// The sums of two channels.
struct PairOfSums {
  RunningSums first, second;

  static __device__ __forceinline__ float* at(const Compress& call, int64_t slot, int64_t position, int channel) {
    const uint32_t row = call.modulo_a(static_cast<uint32_t>(position));
    return call.sums + (slot * call.rows_a + row) * kRunningSums * kEntryDim + channel;
  }
  __device__ __forceinline__ void load(const float* from) {
    float2 v[kRunningSums];
#pragma unroll
    for (int i = 0; i < kRunningSums; ++i) v[i] = *reinterpret_cast<const float2*>(from + i * kEntryDim);
    first = {v[0].x, v[1].x, v[2].x, v[3].x, v[4].x};
    second = {v[0].y, v[1].y, v[2].y, v[3].y, v[4].y};
  }
  __device__ __forceinline__ void store(float* to) const {
    const float2 v[kRunningSums] = {make_float2(first.top, second.top), make_float2(first.sum, second.sum),
                                    make_float2(first.weighted, second.weighted),
                                    make_float2(first.sum_lost, second.sum_lost),
                                    make_float2(first.weighted_lost, second.weighted_lost)};
#pragma unroll
    for (int i = 0; i < kRunningSums; ++i) *reinterpret_cast<float2*>(to + i * kEntryDim) = v[i];
  }
  __device__ __forceinline__ void start(float2 k, float2 z) {
    first = RunningSums::of_token(k.x, z.x);
    second = RunningSums::of_token(k.y, z.y);
  }
  __device__ __forceinline__ void enter(float2 k, float2 z) {
    first = first.with_token(k.x, z.x);
    second = second.with_token(k.y, z.y);
  }
  __device__ __forceinline__ float2 mean() const { return make_float2(first.mean(), second.mean()); }
};

// The sums after the segment's tokens of a window; those after tokens from position `first_kept` on go into the tail.
// All threads call together; `token_of` is theirs to use.
template <typename T>
__device__ __forceinline__ PairOfSums take_window(const Compress& call, int64_t s, const Segment& segment, int64_t entry,
                                                  int64_t first_kept, int channel, int32_t (&token_of)[kRunningRatio]) {
  constexpr int kAhead = 8;  // tokens on their way
  const auto first = static_cast<int32_t>(entry * kRunningRatio);
  const auto begin = max(static_cast<int32_t>(segment.start), first) - first;  // within the window
  const auto end = static_cast<int32_t>(min(segment.end() - first, int64_t{kRunningRatio}));
  const auto kept = static_cast<int32_t>(max(first_kept - first, int64_t{0}));
  __syncthreads();
  if (const int i = begin + threadIdx.x; i < end) {
    token_of[i] = static_cast<int32_t>(call.token(s, first + i - segment.start));
  }
  __syncthreads();
  PairOfSums sums = {};
  if (begin > 0) sums.load(PairOfSums::at(call, segment.slot, first + begin - 1, channel));
  PairOfToken<T> tokens[kAhead];
  const auto load = [&](PairOfToken<T>& token, int i) {
    if (i >= end) return;
    token.load(call, token_of[i], channel);
    token.load_ape(call, i, channel);
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load(tokens[i], begin + i);
#pragma unroll 1
  for (int at = begin; at < end; at += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at + i >= end) break;
      const float2 k = tokens[i].k(), z = tokens[i].z();
      load(tokens[i], at + i + kAhead);
      if (at + i == 0) {
        sums.start(k, z);
      } else {
        sums.enter(k, z);
      }
      if (at + i >= kept && at + i + 1 < kRunningRatio) {
        sums.store(PairOfSums::at(call, segment.slot, first + at + i, channel));
      }
    }
  }
  return sums;
}

// What a block does in a step of one token a slot: the token of segment s.
template <typename T>
__device__ __forceinline__ void take_running_token(const Compress& call, const RecordRows& record, int64_t s,
                                                   EntryScratch* scratch) {
  const int thread = threadIdx.x, channel = thread * 2;
  PairOfToken<T> token;
  token.load(call, s, channel);
  PairConstants constants;
  constants.load(call, s, thread);
  const Segment segment = call.segment(s);
  if (segment.count == 0) return;
  const auto position = static_cast<uint32_t>(segment.start), offset = position % kRunningRatio;
  const uint32_t entry = position / kRunningRatio;
  token.load_ape(call, offset, channel);
  PairOfSums sums;
  sums.load(PairOfSums::at(call, segment.slot, offset ? segment.start - 1 : segment.start, channel));
  const bool closes = offset == kRunningRatio - 1;
  EntryPlace place = {};
  if (closes) place = call.look_up(segment.slot, entry);
  if (offset == 0) {
    sums.start(token.k(), token.z());
  } else {
    sums.enter(token.k(), token.z());
  }
  if (!closes) return sums.store(PairOfSums::at(call, segment.slot, segment.start, channel));
  const int64_t row = call.row_of(place);
  if (row >= 0) finish_entry(call, record, constants, row, thread, sums.mean(), scratch);
}

// What a block does of a segment of several tokens, which `shares` blocks share.
template <typename T>
__device__ __forceinline__ void take_running_share(const Compress& call, const RecordRows& record, uint32_t block,
                                                   uint32_t shares, EntryScratch* scratch) {
  __shared__ int32_t token_of[kRunningRatio];
  const int thread = threadIdx.x, channel = thread * 2;
  const int64_t s = block / shares;
  const int share = static_cast<int>(block - static_cast<uint32_t>(s) * shares);
  const Segment segment = call.segment(s);
  if (segment.count == 0) return;
  const int64_t first_entry = call.first_entry(segment), entry = first_entry + share;
  const int64_t first_kept = max(segment.start, segment.end() - call.rows_a);
  const int64_t row = call.closes(segment, entry) ? call.entry_row(segment.slot, entry) : -1;
  if (row < 0 && share > 0) return;
  const PairOfSums sums = take_window<T>(call, s, segment, entry, share == 0 ? first_kept : segment.end(), channel,
                                         token_of);
  if (row >= 0) {
    PairConstants constants;
    constants.load(call, s * call.windows + share, thread);
    finish_entry(call, record, constants, row, thread, sums.mean(), scratch);
  }
  if (share > 0) return;
  // The first share, which has read what it needs of the tail, writes it.
  const int64_t first_touched = max(first_kept / kRunningRatio, first_entry + 1);
  for (int64_t e = first_touched; e * kRunningRatio < segment.end(); ++e) {
    take_window<T>(call, s, segment, e, first_kept, channel, token_of);
  }
}

template <typename T, bool kOneToken>
__global__ void __launch_bounds__(kRunningThreads)
    running_kernel(const __grid_constant__ Compress call, const __grid_constant__ RecordRows record, const uint32_t shares) {
  __shared__ EntryScratch scratch;
  if (kOneToken) {
    take_running_token<T>(call, record, blockIdx.x, &scratch);
  } else {
    take_running_share<T>(call, record, blockIdx.x, shares, &scratch);
  }
}

template <typename T>
cudaError_t launch_running(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  const int64_t shares = workers_per_segment(call);
  const auto kernel = call.width == 1 ? running_kernel<T, true> : running_kernel<T, false>;
  kernel<<<static_cast<unsigned>(call.segments * shares), kRunningThreads, 0, stream>>>(call, record,
                                                                                      static_cast<uint32_t>(shares));
  return cudaGetLastError();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_RUNNING_CUH_
