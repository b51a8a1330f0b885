// compress on the GPU where every segment is one token, with overlapped windows: a thread two neighbouring channels.
// What is known without the segment is on its way while the segment is looked up, and all of the tail before any of it
// is used; a token that closes nothing writes its rows and is done.
#ifndef DSV4_COMPRESS_DECODE_CUH_
#define DSV4_COMPRESS_DECODE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/device.cuh"
#include "compress/finish.cuh"

namespace dsv4 {

// What the threads that finish together do with the token of segment s.
template <typename T, typename Geometry, typename Finish>
__device__ __forceinline__ void take_token(const Compress& call, const Finish& finish, int64_t s, int thread,
                                           typename Finish::Scratch* scratch) {
  constexpr int kRatio = Geometry::kRatio, kDim = Geometry::kDim;
  static_assert(kDim == 2 * Finish::kThreads, "every channel has a thread");
  const int channel = thread * 2;
  const int32_t slot = call.slot_of[s], start = call.start_of[s], count = call.count_of[s];
  Values<T, 2, Load::kAhead> own_k[2], own_gate[2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) {
    const int64_t offset = (s * 2 + lane) * kDim + channel;
    own_k[lane].load(static_cast<const T*>(call.kv) + offset);
    own_gate[lane].load(static_cast<const T*>(call.gate) + offset);
  }
  typename Finish::Constants constants;
  Finish::load(call, s, thread, &constants);
  if (slot < 0 || slot >= call.slots || start < 0 || count <= 0) return;
  const auto position = static_cast<uint32_t>(start);
  const bool closes = position % kRatio == kRatio - 1, has_before = position >= kRatio;
  const uint32_t own_row_a = call.modulo_a(position), own_row_b = call.modulo_b(position);
  const auto rows_a = static_cast<uint32_t>(call.rows_a), rows_b = static_cast<uint32_t>(call.rows_b);
  const auto row_at = [](float* rows, uint32_t row) { return rows + uint64_t{row} * kDim; };
  // This thread's channels of the slot's rows.
  const uint64_t first_a = uint64_t{static_cast<uint32_t>(slot)} * rows_a * kDim + channel;
  const uint64_t first_b = uint64_t{static_cast<uint32_t>(slot)} * rows_b * kDim + channel;
  float *ka = call.ka + first_a, *za = call.za + first_a, *kb = call.kb + first_b, *zb = call.zb + first_b;

  Values<float, 2, Load::kAhead> ape[2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) ape[lane].load(call.ape + (position % kRatio * 2 + lane) * kDim + channel);
  Values<float, 2, Load::kAhead> k[2 * kRatio - 1], z[2 * kRatio - 1];
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
  float fresh_k[2][2], fresh_z[2][2];
#pragma unroll
  for (int lane = 0; lane < 2; ++lane) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      fresh_k[lane][c] = own_k[lane][c];
      fresh_z[lane][c] = own_gate[lane][c] + ape[lane][c];
    }
  }
  // Over rows that were read above, by the same thread.
  store_pair(row_at(ka, own_row_a), fresh_k[0]);
  store_pair(row_at(za, own_row_a), fresh_z[0]);
  store_pair(row_at(kb, own_row_b), fresh_k[1]);
  store_pair(row_at(zb, own_row_b), fresh_z[1]);
  if (!closes) return;
  float pooled[2];
#pragma unroll
  for (int c = 0; c < 2; ++c) {
    const float own_z = fresh_z[1][c];
    float top = own_z, weights = 0.0f, sums = 0.0f;
    const auto weigh = [&](float k, float z) {
      const float e = exp_of_negative(z - top);
      weights += e;
      sums = fused(e, k, sums);
    };
#pragma unroll
    for (int i = kRatio; i < 2 * kRatio - 1; ++i) top = larger(top, z[i][c]);
    if (has_before) {
#pragma unroll
      for (int i = 0; i < kRatio; ++i) top = larger(top, z[i][c]);
#pragma unroll
      for (int i = 0; i < kRatio; ++i) weigh(k[i][c], z[i][c]);
    }
#pragma unroll
    for (int i = kRatio; i < 2 * kRatio - 1; ++i) weigh(k[i][c], z[i][c]);
    weigh(fresh_k[1][c], own_z);
    pooled[c] = divide(sums, weights);
  }
  const int64_t row = call.row_of(place);
  if (row >= 0) finish(call, constants, row, thread, pooled, scratch);
}

template <typename T, typename Geometry, typename Finish>
__global__ void __launch_bounds__(Finish::kThreads)
    overlapped_decode_kernel(const __grid_constant__ Compress call, const __grid_constant__ Finish finish) {
  __shared__ typename Finish::Scratch scratch;
  take_token<T, Geometry>(call, finish, blockIdx.x, threadIdx.x, &scratch);
}

template <typename T, typename Geometry, typename Finish>
cudaError_t launch_overlapped_decode(const Compress& call, const Finish& finish, cudaStream_t stream) {
  overlapped_decode_kernel<T, Geometry, Finish>
      <<<static_cast<unsigned>(call.segments), Finish::kThreads, 0, stream>>>(call, finish);
  return cudaGetLastError();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_DECODE_CUH_
