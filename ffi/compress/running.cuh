// compress with a running tail on the GPU: a block takes a segment's tokens of a window in order, a thread two
// neighbouring channels.
#ifndef DSV4_COMPRESS_RUNNING_CUH_
#define DSV4_COMPRESS_RUNNING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/entry_in_block.cuh"
#include "math/running_sums.h"

namespace dsv4 {

constexpr int kRunningRatio = 128;

// A thread's channels of a token: kv, and gate to which ape is still to be added.
template <typename T>
struct TokenChannels {
  Ahead<T, 2> k, gate;
  Ahead<float, 2> ape;

  __device__ __forceinline__ void load(const Compress& call, int64_t token, int channel) {
    k.load(static_cast<const T*>(call.kv) + token * kRecordDim + channel);
    gate.load(static_cast<const T*>(call.gate) + token * kRecordDim + channel);
  }
  __device__ __forceinline__ void load_ape(const Compress& call, uint32_t offset, int channel) {  // within the window
    ape.load(call.ape + offset * kRecordDim + channel);
  }
};

// The sums of a thread's channels.
struct SumsOfChannels {
  RunningSums of[2];

  static __device__ __forceinline__ float* at(const Compress& call, int64_t slot, int64_t position, int channel) {
    const uint32_t row = call.modulo_a(static_cast<uint32_t>(position));
    return call.sums + (slot * call.rows_a + row) * kRunningSums * kRecordDim + channel;
  }
  __device__ __forceinline__ void load(const float* from) {
    Ahead<float, 2> v[kRunningSums];
#pragma unroll
    for (int i = 0; i < kRunningSums; ++i) v[i].load(from + i * kRecordDim);
#pragma unroll
    for (int c = 0; c < 2; ++c) of[c] = {v[0][c], v[1][c], v[2][c], v[3][c], v[4][c]};
  }
  __device__ __forceinline__ void store(float* to) const {
    float v[kRunningSums][2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      v[0][c] = of[c].top, v[1][c] = of[c].sum, v[2][c] = of[c].weighted;
      v[3][c] = of[c].sum_lost, v[4][c] = of[c].weighted_lost;
    }
#pragma unroll
    for (int i = 0; i < kRunningSums; ++i) store_pair(to + i * kRecordDim, v[i]);
  }
  template <typename T>
  __device__ __forceinline__ void enter(const TokenChannels<T>& token, bool is_first) {  // of its window
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float z = token.gate[c] + token.ape[c];
      of[c] = is_first ? RunningSums::of_token(token.k[c], z) : of[c].with_token(token.k[c], z);
    }
  }
};

// The sums after the segment's tokens of a window; those after tokens from position `first_kept` on go into the tail.
// All threads call together; `token_of` is theirs to use.
template <typename T>
__device__ __forceinline__ SumsOfChannels take_window(const Compress& call, int64_t s, const Segment& segment, int64_t entry,
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
  SumsOfChannels sums = {};
  if (begin > 0) sums.load(SumsOfChannels::at(call, segment.slot, first + begin - 1, channel));
  TokenChannels<T> tokens[kAhead];
  const auto load = [&](TokenChannels<T>& token, int i) {
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
      const TokenChannels<T> token = tokens[i];
      load(tokens[i], at + i + kAhead);
      sums.enter(token, at + i == 0);
      if (at + i >= kept && at + i + 1 < kRunningRatio) {
        sums.store(SumsOfChannels::at(call, segment.slot, first + at + i, channel));
      }
    }
  }
  return sums;
}

// What a block does in a step of one token a slot: the token of segment s.
template <typename T>
__device__ __forceinline__ void take_running_token(const Compress& call, const FinishRecord& finish, int64_t s,
                                                   FinishRecord::Scratch* scratch) {
  const int thread = threadIdx.x, channel = thread * 2;
  const int32_t slot = call.slot_of[s], start = call.start_of[s], count = call.count_of[s];
  TokenChannels<T> token;
  token.load(call, s, channel);
  FinishRecord::Constants constants;
  FinishRecord::load(call, s, thread, &constants);
  if (slot < 0 || slot >= call.slots || start < 0 || count <= 0) return;
  const uint32_t offset = static_cast<uint32_t>(start) % kRunningRatio;
  token.load_ape(call, offset, channel);
  SumsOfChannels sums;
  sums.load(SumsOfChannels::at(call, slot, offset ? start - 1 : start, channel));
  const bool closes = offset == kRunningRatio - 1;
  EntryPlace place = {};
  if (closes) place = call.look_up(slot, start / kRunningRatio);
  sums.enter(token, offset == 0);
  if (!closes) return sums.store(SumsOfChannels::at(call, slot, start, channel));
  const int64_t row = call.row_of(place);
  if (row < 0) return;
  float mean[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) mean[c] = sums.of[c].mean();
  finish(call, constants, row, thread, mean, scratch);
}

// What a block does of a segment of several tokens, which `shares` blocks share: a window each.
template <typename T>
__device__ __forceinline__ void take_running_share(const Compress& call, const FinishRecord& finish, uint32_t block,
                                                   uint32_t shares, FinishRecord::Scratch* scratch) {
  __shared__ int32_t token_of[kRunningRatio];
  const int thread = threadIdx.x, channel = thread * 2;
  const int64_t s = block / shares;
  const int share = static_cast<int>(block - static_cast<uint32_t>(s) * shares);
  const Segment segment = call.segment(s);
  if (segment.count == 0) return;
  const int64_t first_entry = call.first_entry(segment), entry = first_entry + share;
  const int64_t row = call.closes(segment, entry) ? call.entry_row(segment.slot, entry) : -1;
  // A segment that begins inside a window reads a row of the tail, in its first share, which then writes all that is
  // kept. Another segment reads none, and every share writes what it has.
  const bool reads_tail = segment.start % kRunningRatio > 0;
  const int64_t first_kept = max(segment.start, segment.end() - call.rows_a);
  const int64_t next = (entry + 1) * kRunningRatio;
  const bool keeps = share == 0 || (!reads_tail && next > first_kept && next - kRunningRatio < segment.end());
  if (row < 0 && !keeps) return;
  const SumsOfChannels sums = take_window<T>(call, s, segment, entry, keeps ? first_kept : next, channel, token_of);
  if (row >= 0) {
    FinishRecord::Constants constants;
    FinishRecord::load(call, s * call.windows + share, thread, &constants);
    float mean[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) mean[c] = sums.of[c].mean();
    finish(call, constants, row, thread, mean, scratch);
  }
  if (share > 0 || !reads_tail) return;
  const int64_t first_touched = max(first_kept / kRunningRatio, first_entry + 1);
  for (int64_t e = first_touched; e * kRunningRatio < segment.end(); ++e) {
    take_window<T>(call, s, segment, e, first_kept, channel, token_of);
  }
}

template <typename T, bool kOneToken>
__global__ void __launch_bounds__(FinishRecord::kThreads)
    running_kernel(const __grid_constant__ Compress call, const __grid_constant__ FinishRecord finish,
                   const uint32_t shares) {
  __shared__ FinishRecord::Scratch scratch;
  if (kOneToken) {
    take_running_token<T>(call, finish, blockIdx.x, &scratch);
  } else {
    take_running_share<T>(call, finish, blockIdx.x, shares, &scratch);
  }
}

template <typename T>
cudaError_t launch_running(const Compress& call, const FinishRecord& finish, cudaStream_t stream) {
  const int64_t shares = workers_per_segment(call);
  const auto kernel = call.width == 1 ? running_kernel<T, true> : running_kernel<T, false>;
  kernel<<<static_cast<unsigned>(call.segments * shares), FinishRecord::kThreads, 0, stream>>>(
      call, finish, static_cast<uint32_t>(shares));
  return cudaGetLastError();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_RUNNING_CUH_
