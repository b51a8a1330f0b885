// A product with block-scaled FP8 weights for one or two tokens, at the rate the weights come from memory.
//
// A block streams rows through a ring in shared memory, filled by one warp; its other eight warps take 256 columns of
// 16 rows each. The activations of all columns are in shared memory, as halves. Sums of the warps that share rows are
// added in the order of the columns.
#ifndef DSV4_PROJECTION_FEW_TOKENS_CUH_
#define DSV4_PROJECTION_FEW_TOKENS_CUH_

#include "projection/input.cuh"

namespace dsv4::projection {

constexpr int kConsumers = 256, kThreads = kConsumers + 32;
constexpr int kPart = 256;          // columns of a warp
constexpr int kStageCodes = 32768;  // bytes of a stage without its pads
constexpr int kPad = 64;
constexpr int kFewTokens = 2;

__device__ __forceinline__ void consumers_sync() { ptx::sync_threads(1, kConsumers); }

template <int kColumns>
struct Few {
  static constexpr int kRows = kStageCodes / kColumns, kPitch = kColumns + kPad, kStageBytes = kRows * kPitch;
  static constexpr int kWarps = kColumns / kPart;  // that share rows
  static constexpr int kSumBytes = 2 * kWarps * kRows * 8 * 4;
  static int shared_bytes(int stages, int columns, int places) {
    return stages * (kStageBytes + 16) + kSumBytes + columns * places * 2 + 96;
  }
};

// kColumns: of a stage, a divisor of the call's. kPlaces: tokens there is room for.
template <int kColumns, int kPlaces, Before kBefore>
__global__ void __launch_bounds__(kThreads, 1) few_tokens_kernel(const Call call, const int stages) {
  using F = Few<kColumns>;
  extern __shared__ __align__(128) uint8_t shared[];
  float* sums = reinterpret_cast<float*>(shared + stages * F::kStageBytes);
  uint4* activations = reinterpret_cast<uint4*>(shared + stages * F::kStageBytes + F::kSumBytes);
  float* inverse = reinterpret_cast<float*>(activations + call.columns * kPlaces / 8);
  uint32_t* largest_of = reinterpret_cast<uint32_t*>(inverse + 8);  // of the warps
  float* squares_of = inverse + 16;
  uint64_t* full = reinterpret_cast<uint64_t*>(inverse + 24);
  uint64_t* empty = full + stages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < stages; ++i) ptx::barrier_init(full + i, 1), ptx::barrier_init(empty + i, kConsumers / 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::grid_launch_dependents();
  const int row_blocks = call.rows / F::kRows, steps = call.columns / kColumns;
  int item = static_cast<int>(static_cast<int64_t>(row_blocks) * blockIdx.x / gridDim.x);
  const int last = static_cast<int>(static_cast<int64_t>(row_blocks) * (blockIdx.x + 1) / gridDim.x);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
  int stage = 0;
  uint32_t phase = 0;
  const auto next = [&] {
    if (++stage == stages) stage = 0, phase ^= 1;
  };

  if (warp == kConsumers / 32) {
    const uint64_t policy = ptx::read_once();
    for (; item < last; ++item) {
      const Weight weight = call.of_row(item * F::kRows);
      const uint8_t* codes = weight.codes + static_cast<int64_t>(item * F::kRows - weight.first) * call.columns;
      for (int step = 0; step < steps; ++step, next()) {
        ptx::barrier_wait(empty + stage, phase ^ 1);
        if (lane == 0) ptx::barrier_arrive_expect(full + stage, kStageCodes);
        __syncwarp();
#pragma unroll
        for (int row = lane; row < F::kRows; row += 32) {
          ptx::copy_bulk_once(shared + stage * F::kStageBytes + row * F::kPitch,
                              codes + static_cast<int64_t>(row) * call.columns + step * kColumns, kColumns,
                              full + stage, policy);
        }
      }
    }
    return;
  }

  ptx::grid_wait();  // x
  const int part = warp % F::kWarps, row = warp / F::kWarps * 16;
  int group = -1, buffer = 0;
  for (; item < last; ++item, buffer ^= 1) {
    const int first_row = item * F::kRows;
    if (first_row / (call.rows / call.groups) != group) {
      group = first_row / (call.rows / call.groups);
      consumers_sync();
      // The warps share the tokens: a token's largest magnitude, then its values, in pieces of 64 as the fragments of
      // four products.
      constexpr int kSharing = kConsumers / 32 / kPlaces;
      const int token = warp / kSharing, first = warp % kSharing * 32 + lane;
      const int64_t of_row = call.row_of(token, group);
      Magnitude<kBefore> magnitude;
      if (token < call.tokens) {
#pragma unroll 4
        for (int i = first; i < call.columns / 8; i += 32 * kSharing) magnitude.take(call, of_row, i);
        magnitude.reduce_warp();
      }
      if constexpr (kSharing > 1) {
        if (lane == 0) largest_of[warp] = magnitude.largest, squares_of[warp] = magnitude.squares;
        consumers_sync();
        magnitude = {};
#pragma unroll
        for (int i = 0; i < kSharing; ++i)
          magnitude.add(largest_of[token * kSharing + i], squares_of[token * kSharing + i]);
      }
      if (token < call.tokens) {
        const float root = magnitude.root(call), power = into_halves(magnitude.bits(root));
        if (warp % kSharing == 0 && lane == 0) inverse[token] = inverse_power(power);
#pragma unroll 4
        for (int i = first; i < call.columns / 8; i += 32 * kSharing) {
          const uint4 v = prepared<kBefore>(call, of_row, i, root);
          const auto pair = [power](uint32_t p) {
            return ptx::half_pair(__uint_as_float(p << 16) * power, __uint_as_float(p & 0xFFFF0000u) * power);
          };
          // Piece i / 8, quarter i / 2 mod 4, half i mod 2.
          activations[((i / 8 * 2 + i % 2) * 4 + i / 2 % 4) * kPlaces + token] =
              make_uint4(pair(v.x), pair(v.y), pair(v.z), pair(v.w));
        }
      }
      consumers_sync();
    }
    const Weight weight = call.of_row(first_row);
    float sum[4] = {};
    for (int step = 0; step < steps; ++step, next()) {
      const int64_t first_scale = static_cast<int64_t>(first_row - weight.first + row) / 128 * (call.columns / 128) +
                                  step * (kColumns / 128) + part * 2;
      const uint16_t scales = __ldg(reinterpret_cast<const uint16_t*>(weight.scale + first_scale));
      ptx::barrier_wait(full + stage, phase);
      const uint8_t* codes = shared + stage * F::kStageBytes + (row + lane / 4) * F::kPitch + part * kPart + c * 16;
      const uint4* a = activations + static_cast<int64_t>(step * (kColumns / 64) + part * (kPart / 64)) * 8 * kPlaces;
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        float d[2][4] = {};
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint4 q = *reinterpret_cast<const uint4*>(codes + (block * 2 + j) * 64);
          const uint4 r = *reinterpret_cast<const uint4*>(codes + 8 * F::kPitch + (block * 2 + j) * 64);
          uint4 b[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
          if (lane / 4 < call.tokens) {
#pragma unroll
            for (int h = 0; h < 2; ++h) b[h] = a[(((block * 2 + j) * 2 + h) * 4 + c) * kPlaces + lane / 4];
          }
          const auto step16 = [&](float (&sum)[4], uint32_t upper, uint32_t lower, uint32_t b0, uint32_t b1) {
            uint4 codes;
            ptx::halves_of_e4m3(upper, &codes.x, &codes.z);
            ptx::halves_of_e4m3(lower, &codes.y, &codes.w);
            ptx::product_of_warp(sum, codes, b0, b1);
          };
          step16(d[0], q.x, r.x, b[0].x, b[0].y);
          step16(d[1], q.y, r.y, b[0].z, b[0].w);
          step16(d[0], q.z, r.z, b[1].x, b[1].y);
          step16(d[1], q.w, r.w, b[1].z, b[1].w);
        }
        const float scale = __uint_as_float(static_cast<uint32_t>(scales >> (8 * block) & 0xFF) << 23);
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i] += (d[0][i] + d[1][i]) * scale;
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(empty + stage);
    }
    float2* to =
        reinterpret_cast<float2*>(sums + ((buffer * F::kWarps + part) * F::kRows + row + lane / 4) * 8 + c * 2);
    to[0] = make_float2(sum[0], sum[1]);
    to[32] = make_float2(sum[2], sum[3]);
    consumers_sync();
    for (int i = threadIdx.x; i < F::kRows * call.tokens; i += kConsumers) {
      const int token = i / F::kRows, r = i % F::kRows;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < F::kWarps; ++w) total += sums[((buffer * F::kWarps + w) * F::kRows + r) * 8 + token];
      weight.y[static_cast<int64_t>(token) * weight.rows + first_row - weight.first + r] =
          __float2bfloat16_rn(total * inverse[token]);
    }
  }
}

}  // namespace dsv4::projection

#endif  // DSV4_PROJECTION_FEW_TOKENS_CUH_
