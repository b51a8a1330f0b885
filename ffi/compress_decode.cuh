// compress on the GPU where every segment is one token, with overlapped windows: a block a token, a thread one or two
// neighbouring channels. What is known without the segment is on its way while the segment is looked up, and all of the
// tail before any of it is used; a token that closes nothing writes its rows and is done.
#ifndef DSV4_COMPRESS_DECODE_CUH_
#define DSV4_COMPRESS_DECODE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress_device.cuh"
#include "entry_of_pairs.cuh"

namespace dsv4 {

// kWidth neighbouring channels.
template <int kWidth>
struct Few {
  float x[kWidth];

  __device__ __forceinline__ void load(const float* from) {
    if constexpr (kWidth == 2) {
      const float2 v = *reinterpret_cast<const float2*>(from);
      x[0] = v.x, x[1] = v.y;
    } else {
      x[0] = *from;
    }
  }
  __device__ __forceinline__ void load_constant(const float* from) {
    if constexpr (kWidth == 2) {
      const float2 v = __ldg(reinterpret_cast<const float2*>(from));
      x[0] = v.x, x[1] = v.y;
    } else {
      x[0] = __ldg(from);
    }
  }
  __device__ __forceinline__ void load_token(const float* from) {
    if constexpr (kWidth == 2) {
      const float2 v = __ldcs(reinterpret_cast<const float2*>(from));
      x[0] = v.x, x[1] = v.y;
    } else {
      x[0] = __ldcs(from);
    }
  }
  __device__ __forceinline__ void load_token(const BFloat16* from) {
    if constexpr (kWidth == 2) {
      const uint32_t v = __ldcs(reinterpret_cast<const uint32_t*>(from));
      x[0] = float_of(v << 16), x[1] = float_of(v & 0xFFFF0000u);
    } else {
      x[0] = float_of(static_cast<uint32_t>(__ldcs(reinterpret_cast<const uint16_t*>(from))) << 16);
    }
  }
  __device__ __forceinline__ void store(float* to) const {
    if constexpr (kWidth == 2) {
      *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
    } else {
      *to = x[0];
    }
  }
};

// Finishes an entry whose values lie in the registers of all threads of a block.
struct FinishRecord {
  RecordRows record;
  using Scratch = EntryScratch;
  using Constants = PairConstants;
  static constexpr int kWidth = 2;

  static __device__ __forceinline__ void load(const Compress& call, int64_t s, int thread, Constants* constants) {
    constants->load(call, s, thread);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             const Few<2>& v, Scratch* scratch) const {
    finish_entry(call, record, constants, row, thread, make_float2(v.x[0], v.x[1]), scratch);
  }
};

// A key is finished by the first warp, with four channels a lane.
struct FinishKey {
  KeyRows keys;
  struct Scratch {
    float4 values[32];
  };
  using Constants = EntryConstants;
  static constexpr int kWidth = 1;

  static __device__ __forceinline__ void load(const Compress& call, int64_t s, int thread, Constants* constants) {
    if (thread < 32) constants->template load<128, 64>(call, s, thread);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             const Few<1>& v, Scratch* scratch) const {
    reinterpret_cast<float*>(scratch->values)[thread] = v.x[0];
    __syncthreads();
    if (thread >= 32) return;
    Four values = four(scratch->values[thread]);
    normalise<128, 64>(call, constants, thread, &values, nullptr);
    write_key(keys, row, thread, values);
  }
};

// What the first kDim / kWidth threads of a block do with the token of segment s; the others have returned.
template <typename T, typename Geometry, typename Finish>
__device__ __forceinline__ void take_token(const Compress& call, const Finish& finish, int64_t s,
                                           typename Finish::Scratch* scratch) {
  constexpr int kRatio = Geometry::kRatio, kDim = Geometry::kDim, kWidth = Finish::kWidth;
  using Values = Few<kWidth>;
  const int thread = threadIdx.x, channel = thread * kWidth;
  const Segment segment = call.segment(s);
  Values own_k[2], own_z[2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) {
    const int64_t offset = (s * 2 + lane) * kDim + channel;
    own_k[lane].load_token(static_cast<const T*>(call.kv) + offset);
    own_z[lane].load_token(static_cast<const T*>(call.gate) + offset);
  }
  typename Finish::Constants constants;
  Finish::load(call, s, thread, &constants);
  if (segment.count == 0) return;
  const auto position = static_cast<uint32_t>(segment.start);
  const bool closes = position % kRatio == kRatio - 1, has_before = position >= kRatio;
  const uint32_t own_row_a = call.modulo_a(position), own_row_b = call.modulo_b(position);
  const auto slot = static_cast<uint32_t>(segment.slot);
  const auto rows_a = static_cast<uint32_t>(call.rows_a), rows_b = static_cast<uint32_t>(call.rows_b);
  const auto row_at = [](float* rows, uint32_t row) { return rows + row * static_cast<uint32_t>(kDim); };
  // This thread's channels of the slot's rows.
  const uint64_t first_a = static_cast<uint64_t>(slot) * rows_a * kDim + channel;
  const uint64_t first_b = static_cast<uint64_t>(slot) * rows_b * kDim + channel;
  float *ka = call.ka + first_a, *za = call.za + first_a, *kb = call.kb + first_b, *zb = call.zb + first_b;

  Values ape[2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) ape[lane].load_constant(call.ape + (position % kRatio * 2 + lane) * kDim + channel);
  Values k[2 * kRatio], z[2 * kRatio];
  EntryPlace place;
  if (closes) {
    place = call.look_up(slot, position / kRatio);
    // Lane a of the window before, then lane b of this one but for its own token.
    const auto load = [&](int i, uint32_t back, uint32_t own_row, uint32_t rows, float* from_k, float* from_z) {
      const uint32_t row = own_row - back + (own_row < back ? rows : 0u);
      z[i].load(row_at(from_z, row));
      k[i].load(row_at(from_k, row));
    };
    if (has_before) {
#pragma unroll
      for (int i = 0; i < kRatio; ++i) load(i, 2 * kRatio - 1 - i, own_row_a, rows_a, ka, za);
    }
#pragma unroll
    for (int i = 0; i < kRatio - 1; ++i) load(kRatio + i, kRatio - 1 - i, own_row_b, rows_b, kb, zb);
  }
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) own_z[lane].x[c] += ape[lane].x[c];
  }
  // Over a row that was read above, by the same thread.
  own_k[0].store(row_at(ka, own_row_a));
  own_z[0].store(row_at(za, own_row_a));
  own_k[1].store(row_at(kb, own_row_b));
  own_z[1].store(row_at(zb, own_row_b));
  if (!closes) return;
  k[2 * kRatio - 1] = own_k[1], z[2 * kRatio - 1] = own_z[1];
  Values top = own_z[1], weights = {}, sums = {};
  const auto raise = [&](const Values& z) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) top.x[c] = larger(top.x[c], z.x[c]);
  };
  const auto weigh = [&](const Values& k, const Values& z) {
#pragma unroll
    for (int c = 0; c < kWidth; ++c) {
      const float e = exp_of_negative(z.x[c] - top.x[c]);
      weights.x[c] += e;
      sums.x[c] = fused(e, k.x[c], sums.x[c]);
    }
  };
#pragma unroll
  for (int i = kRatio; i < 2 * kRatio - 1; ++i) raise(z[i]);
  if (has_before) {
#pragma unroll
    for (int i = 0; i < kRatio; ++i) raise(z[i]);
#pragma unroll
    for (int i = 0; i < kRatio; ++i) weigh(k[i], z[i]);
  }
#pragma unroll
  for (int i = kRatio; i < 2 * kRatio; ++i) weigh(k[i], z[i]);
  Values pooled;
#pragma unroll
  for (int c = 0; c < kWidth; ++c) pooled.x[c] = divide(sums.x[c], weights.x[c]);
  const int64_t row = call.row_of(place);
  if (row >= 0) finish(call, constants, row, thread, pooled, scratch);
}

template <typename T, typename Geometry, typename Finish>
__global__ void __launch_bounds__(Geometry::kDim / Finish::kWidth)
    overlapped_decode_kernel(const __grid_constant__ Compress call, const __grid_constant__ Finish finish) {
  __shared__ typename Finish::Scratch scratch;
  take_token<T, Geometry>(call, finish, blockIdx.x, &scratch);
}

template <typename T, typename Geometry, typename Finish>
cudaError_t launch_overlapped_decode(const Compress& call, const Finish& finish, cudaStream_t stream) {
  overlapped_decode_kernel<T, Geometry, Finish>
      <<<static_cast<unsigned>(call.segments), Geometry::kDim / Finish::kWidth, 0, stream>>>(call, finish);
  return cudaGetLastError();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_DECODE_CUH_
