// compress with a running tail on the GPU: a block takes a segment's tokens of a window in order, a thread two
// neighbouring channels.
#ifndef DSV4_COMPRESS_RUNNING_CUH_
#define DSV4_COMPRESS_RUNNING_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/device.cuh"
#include "compress/finish.cuh"
#include "math/running_sums.h"

namespace dsv4 {

// A thread's channels of a token: kv, and gate to which ape is still to be added.
template <typename T, typename Geometry>
struct TokenChannels {
  Values<T, 2, Load::kAhead> k, gate;
  Values<float, 2, Load::kAhead> ape;

  __device__ __forceinline__ void load(const Compress& call, int64_t token, int channel) {
    k.load(static_cast<const T*>(call.kv) + token * Geometry::kDim + channel);
    gate.load(static_cast<const T*>(call.gate) + token * Geometry::kDim + channel);
  }
  __device__ __forceinline__ void load_ape(const Compress& call, uint32_t offset, int channel) {  // within the window
    ape.load(call.ape + offset * Geometry::kDim + channel);
  }
};

// The sums of a thread's channels.
template <typename Geometry>
struct SumsOfChannels {
  RunningSums of[2];

  static __device__ __forceinline__ float* at(const Compress& call, int64_t slot, int64_t position, int channel) {
    const uint32_t row = call.modulo_a(static_cast<uint32_t>(position));
    return call.sums + (slot * call.rows_a + row) * kRunningSums * Geometry::kDim + channel;
  }
  __device__ __forceinline__ void load(const float* from) {
    Values<float, 2, Load::kAhead> v[kRunningSums];
#pragma unroll
    for (int i = 0; i < kRunningSums; ++i) v[i].load(from + i * Geometry::kDim);
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
    for (int i = 0; i < kRunningSums; ++i) store_pair(to + i * Geometry::kDim, v[i]);
  }
  template <typename T>
  __device__ __forceinline__ void enter(const TokenChannels<T, Geometry>& token, bool is_first) {  // of its window
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float z = token.gate[c] + token.ape[c];
      of[c] = is_first ? RunningSums::of_token(token.k[c], z) : of[c].with_token(token.k[c], z);
    }
  }
};

// The sums after the segment's tokens of a window; those after tokens from position `first_kept` on go into the tail.
// All threads call together; `token_of` is theirs to use.
template <typename T, typename Geometry>
__device__ __forceinline__ SumsOfChannels<Geometry> take_window(const Compress& call, const WindowOf& window,
                                                                int64_t first_kept, int channel, int32_t* token_of) {
  using Sums = SumsOfChannels<Geometry>;
  const Segment& segment = window.segment;
  constexpr int kAhead = 8;  // tokens on their way
  const auto first = static_cast<int32_t>(window.entry * Geometry::kRatio);
  const auto begin = max(static_cast<int32_t>(segment.start), first) - first;  // within the window
  const auto end = static_cast<int32_t>(min(segment.end() - first, int64_t{Geometry::kRatio}));
  const auto kept = static_cast<int32_t>(max(first_kept - first, int64_t{0}));
  __syncthreads();
  if (const int i = begin + threadIdx.x; i < end) {
    token_of[i] = static_cast<int32_t>(call.token(window.s, first + i - segment.start));
  }
  __syncthreads();
  Sums sums = {};
  if (begin > 0) sums.load(Sums::at(call, segment.slot, first + begin - 1, channel));
  TokenChannels<T, Geometry> tokens[kAhead];
  const auto load = [&](TokenChannels<T, Geometry>& token, int i) {
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
      const TokenChannels<T, Geometry> token = tokens[i];
      load(tokens[i], at + i + kAhead);
      sums.enter(token, at + i == 0);
      if (at + i >= kept && at + i + 1 < Geometry::kRatio) {
        sums.store(Sums::at(call, segment.slot, first + at + i, channel));
      }
    }
  }
  return sums;
}

// What a block does in a step of one token a slot: the token of segment s.
template <typename T, typename Geometry, typename Finish>
__device__ __forceinline__ void take_running_token(const Compress& call, const Finish& finish, int64_t s,
                                                   typename Finish::Scratch* scratch) {
  using Sums = SumsOfChannels<Geometry>;
  const int thread = threadIdx.x, channel = thread * 2;
  const int32_t slot = call.slot_of[s], start = call.start_of[s], count = call.count_of[s];
  TokenChannels<T, Geometry> token;
  token.load(call, s, channel);
  typename Finish::Constants constants;
  Finish::load(call, s, thread, &constants);
  if (slot < 0 || slot >= call.slots || start < 0 || count <= 0) return;
  const uint32_t offset = static_cast<uint32_t>(start) % Geometry::kRatio;
  token.load_ape(call, offset, channel);
  Sums sums;
  sums.load(Sums::at(call, slot, offset ? start - 1 : start, channel));
  const bool closes = offset == Geometry::kRatio - 1;
  EntryPlace place = {};
  if (closes) place = call.look_up(slot, start / Geometry::kRatio);
  sums.enter(token, offset == 0);
  if (!closes) return sums.store(Sums::at(call, slot, start, channel));
  const int64_t row = call.row_of(place);
  if (row < 0) return;
  float mean[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) mean[c] = sums.of[c].mean();
  finish(call, constants, row, thread, mean, scratch);
}

// What a block does of a segment of several tokens, which `shares` blocks share: a window each.
template <typename T, typename Geometry, typename Finish>
__device__ __forceinline__ void take_running_share(const Compress& call, const Finish& finish, uint32_t block,
                                                   uint32_t shares, typename Finish::Scratch* scratch) {
  __shared__ int32_t token_of[Geometry::kRatio];
  const int thread = threadIdx.x, channel = thread * 2;
  const int64_t s = block / shares;
  const int share = static_cast<int>(block - static_cast<uint32_t>(s) * shares);
  const Segment segment = call.segment(s);
  if (segment.count == 0) return;
  const int64_t first_entry = call.first_entry(segment), entry = first_entry + share;
  const int64_t row = call.closes(segment, entry) ? call.entry_row(segment.slot, entry) : -1;
  // A segment that begins inside a window reads a row of the tail, in its first share, which then writes all that is
  // kept. Another segment reads none, and every share writes what it has.
  const bool reads_tail = segment.start % Geometry::kRatio > 0;
  const int64_t first_kept = max(segment.start, segment.end() - call.rows_a);
  const int64_t next = (entry + 1) * Geometry::kRatio;
  const bool keeps = share == 0 || (!reads_tail && next > first_kept && next - Geometry::kRatio < segment.end());
  if (row < 0 && !keeps) return;
  const SumsOfChannels<Geometry> sums =
      take_window<T, Geometry>(call, {s, segment, entry}, keeps ? first_kept : next, channel, token_of);
  if (row >= 0) {
    typename Finish::Constants constants;
    Finish::load(call, s * call.windows + share, thread, &constants);
    float mean[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) mean[c] = sums.of[c].mean();
    finish(call, constants, row, thread, mean, scratch);
  }
  if (share > 0 || !reads_tail) return;
  const int64_t first_touched = max(first_kept / Geometry::kRatio, first_entry + 1);
  for (int64_t e = first_touched; e * Geometry::kRatio < segment.end(); ++e) {
    take_window<T, Geometry>(call, {s, segment, e}, first_kept, channel, token_of);
  }
}

template <typename T, typename Geometry, bool kOneToken, typename Finish>
__global__ void __launch_bounds__(Finish::kThreads)
    running_kernel(const __grid_constant__ Compress call, const __grid_constant__ Finish finish,
                   const uint32_t shares) {
  __shared__ typename Finish::Scratch scratch;
  if (kOneToken) {
    take_running_token<T, Geometry>(call, finish, blockIdx.x, &scratch);
  } else {
    take_running_share<T, Geometry>(call, finish, blockIdx.x, shares, &scratch);
  }
}

template <typename T, typename Geometry>
cudaError_t launch_running(const Compress& call, const RecordRows& record, cudaStream_t stream) {
  using Finish = FinishRecordInBlock<typename Geometry::Form>;
  const int64_t shares = workers_per_segment(call);
  const auto kernel =
      call.width == 1 ? running_kernel<T, Geometry, true, Finish> : running_kernel<T, Geometry, false, Finish>;
  kernel<<<static_cast<unsigned>(call.segments * shares), Finish::kThreads, 0, stream>>>(call, Finish{record},
                                                                                         static_cast<uint32_t>(shares));
  return cudaGetLastError();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_RUNNING_CUH_
