// Routed experts of few tokens: every chosen expert is read once, at the memory's rate.
//
// Two kernels, gate and up with SwiGLU, then down. A block streams 64 rows by 1,024 columns at a time through a ring in
// shared memory, filled by four warps; the warpgroups share the columns. E2M1 codes become E4M3 codes in registers, a
// group of 32 columns is one product with up to eight tokens, and its scale multiplies the float that comes of it.
#ifndef DSV4_EXPERTS_FEW_TOKENS_CUH_
#define DSV4_EXPERTS_FEW_TOKENS_CUH_

#include "cuda/split_e4m3.cuh"
#include "cuda/weight_mma.cuh"
#include "cuda/wgmma.cuh"
#include "experts/routes.cuh"

namespace dsv4::experts {

constexpr int kRows = 64, kStageColumns = 1024, kPieceTokens = 8;
constexpr int kStagePitch = kStageColumns / 2 + 16;  // reads of 8 rows meet no bank twice
constexpr int kStageBytes = kRows * kStagePitch;
constexpr int kProducers = 128;  // one warp alone cannot start copies fast enough

template <int kColumns, int kStages, int kWarpgroups>
struct Layout {
  static constexpr int kSteps = kColumns / kStageColumns, kScaleBytes = kRows * kColumns / 32;
  static constexpr int kScaleBuffers =
      (kStages + kSteps - 1) / kSteps + 1;  // an item's scales stay until its last stage is done
  static constexpr int kScales = kStages * kStageBytes, kTokens = kScales + kScaleBuffers * kScaleBytes;
  static constexpr int kSums = kTokens + kColumns * 2 * kPieceTokens,
                       kLargest = kSums + 2 * kWarpgroups * kRows * kPieceTokens * 4;
  static constexpr int kEntries = kLargest + kPieceTokens * 16 * 4, kShares = kEntries + kPieceTokens * 4;
  static constexpr int kBarriers = kShares + kPieceTokens * 4, kShared = kBarriers + 2 * kStages * 8;
};

template <int kThreads>
__device__ __forceinline__ void group_sync() {
  ptx::sync_threads(1, kThreads);
}

// Puts a piece's tokens into shared memory, and the factors of their products into `inverse`.
template <int kColumns, int kThreads, typename Value, typename Row>
__device__ __forceinline__ void load_tokens(int count, const Row& row, uint8_t* tokens, float* largest_of,
                                            float (&inverse)[2]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, c = lane % 4, width = count <= 4 ? 8 : 16;
#pragma unroll 4
  for (int t = 0; t < count; ++t) {
    const uint4* from = row(t);
    float largest = 0;
    for (int i = threadIdx.x; i < kColumns / 8; i += kThreads) {
      const uint4 v = from[i];
      const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 f = floats_of(words[j], Value());
        // So written, a NaN is kept.
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(f.x)));
        asm("max.NaN.f32 %0, %0, %1;" : "+f"(largest) : "f"(fabsf(f.y)));
      }
    }
    uint32_t bits = __float_as_uint(largest);
    bits = __reduce_max_sync(0xFFFFFFFFu, bits);
    if (lane == 0) largest_of[t * 16 + warp] = __uint_as_float(bits);
  }
  group_sync<kThreads>();
  // What is in the places of tokens that are not there does not matter: each has products of its own.
#pragma unroll 2
  for (int t = 0; t < count; ++t) {
    uint32_t bits = 0;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) bits = max(bits, __float_as_uint(largest_of[t * 16 + w]));
    const float power = into_e4m3(__uint_as_float(bits));
    if (t == c) inverse[0] = 64.0f / power;
    if (t == c + 4) inverse[1] = 64.0f / power;
    const uint4* from = row(t);
    for (int i = threadIdx.x; i < kColumns / 8; i += kThreads) {
      const uint4 v = from[i];
      const float2 p = floats_of(v.x, Value()), q = floats_of(v.y, Value()), r = floats_of(v.z, Value()),
                   s = floats_of(v.w, Value());
      const uint2 even = split_four(p.x * power, q.x * power, r.x * power, s.x * power);
      const uint2 odd = split_four(p.y * power, q.y * power, r.y * power, s.y * power);
      uint8_t* to = tokens + (i / 4 * 2 * width + 2 * t) * 16 + i % 4 * 4;
      *reinterpret_cast<uint32_t*>(to) = even.x;
      *reinterpret_cast<uint32_t*>(to + 16) = even.y;
      *reinterpret_cast<uint32_t*>(to + width * 16) = odd.x;
      *reinterpret_cast<uint32_t*>(to + width * 16 + 16) = odd.y;
    }
  }
  ptx::fence_shared_proxy();
  group_sync<kThreads>();
}

// kGroups groups of 32 columns of a warp's 16 rows: sum[h][w] += rows r + 8 h times token c + 4 w.
template <int kWidth, int kGroups>
__device__ __forceinline__ void multiply_groups(uint32_t codes, const uint8_t* scale, int scale_pitch, uint32_t tokens,
                                                float (&sum)[2][2]) {
  constexpr int kBatch = 4;
  uint32_t scales[2][kGroups / 4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < kGroups / 4; i += 2) {
      const uint2 v = *reinterpret_cast<const uint2*>(scale + h * 8 * scale_pitch + i * 4);
      scales[h][i] = v.x, scales[h][i + 1] = v.y;
    }
  }
  float d[2][kBatch][kWidth / 2];
  uint32_t a[2][kBatch][4];
  float part[2][2][2] = {};
  const ptx::PieceDescriptors<kWidth * 16> descriptors(tokens);
  const auto add = [&](int batch) {
#pragma unroll
    for (int g = 0; g < kBatch; ++g) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t word = scales[h][batch];
        const uint32_t bits = (g == 0   ? word << 23
                               : g == 1 ? word << 15
                               : g == 2 ? word << 7
                                        : word >> 1) &
                              0x7F800000u;
        const float value = __uint_as_float(bits);
#pragma unroll
        for (int w = 0; w < kWidth / 8; ++w) {
          part[g % 2][h][w] += (d[batch % 2][g][4 * w + 2 * h] + d[batch % 2][g][4 * w + 2 * h + 1]) * value;
        }
      }
    }
  };
#pragma unroll
  for (int batch = 0; batch < kGroups / kBatch; ++batch) {
#pragma unroll
    for (int g = 0; g < kBatch; g += 2) {
      uint32_t q[4];
      ptx::load_matrices(codes + (batch * kBatch + g) * 16, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t* to = a[batch % 2][g + i / 2];
        to[i % 2] = ((q[i] << 4) & 0x80808080u) | ((q[i] << 2) & 0x1C1C1C1Cu);
        to[2 + i % 2] = (q[i] & 0x80808080u) | ((q[i] >> 2) & 0x1C1C1C1Cu);
      }
    }
    ptx::products_fence();
#pragma unroll
    for (int g = 0; g < kBatch; ++g) {
      wgmma_e4m3<kWidth>(d[batch % 2][g], a[batch % 2][g], descriptors.at((batch * kBatch + g) * 2 * kWidth * 16), 0);
    }
    ptx::products_commit();
    if (batch) {
      ptx::products_wait<1>();
      add(batch - 1);
    }
  }
  ptx::products_wait<0>();
  add(kGroups / kBatch - 1);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int w = 0; w < kWidth / 8; ++w) sum[h][w] += part[0][h][w] + part[1][h][w];
  }
}

struct TokenPiece {
  int expert, begin, count;
};
__device__ __forceinline__ int pieces_of(const Call& call) { return call.routes.slots ? call.routes.tiles[0] : call.k; }
__device__ __forceinline__ TokenPiece token_piece(const Call& call, int piece) {
  if (!call.routes.slots) {
    const int expert = call.picks[piece];
    return {expert, piece, expert >= 0 && expert < call.experts ? 1 : 0};
  }
  const int slot = call.routes.tiles[1 + 2 * piece], begin = call.routes.begin[slot] + call.routes.tiles[2 + 2 * piece];
  return {call.routes.expert[slot], begin, min(kPieceTokens, call.routes.begin[slot + 1] - begin)};
}

// kGate: 32 rows of w1 and of w3, columns = hidden; otherwise 64 rows of w2, columns = inner.
template <bool kGate, int kColumns, int kOutRows, int kStages, int kWarpgroups>
__global__ void __launch_bounds__(kWarpgroups * 128 + kProducers, 1) few_kernel(const Call call) {
  using L = Layout<kColumns, kStages, kWarpgroups>;
  constexpr int kThreads = kWarpgroups * 128, kItemRows = kGate ? 32 : 64, kRowBlocks = kOutRows / kItemRows;
  extern __shared__ __align__(128) uint8_t shared[];
  uint64_t* full = reinterpret_cast<uint64_t*>(shared + L::kBarriers);
  uint64_t* empty = full + kStages;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) ptx::barrier_init(full + i, 1), ptx::barrier_init(empty + i, kThreads / 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (kGate) ptx::grid_wait();  // routes, which what follows reads without waiting
  ptx::grid_launch_dependents();
  int item, last;
  own_items(pieces_of(call) * kRowBlocks, &item, &last);
  int stage = 0, buffer = 0, current = -1;
  uint32_t phase = 0;
  TokenPiece piece = {};
  const auto next = [&] {
    if (++stage == kStages) stage = 0, phase ^= 1;
  };
  // Whether the item is the first of its piece here.
  const auto takes_piece = [&] {
    if (item / kRowBlocks == current) return false;
    current = item / kRowBlocks, piece = token_piece(call, current);
    return true;
  };

  if (threadIdx.x >= kThreads) {
    const uint64_t policy = ptx::read_once();
    const int warp = threadIdx.x / 32 - kThreads / 32, lane = threadIdx.x % 32, row_in_stage = warp * 16 + lane;
    for (; item < last; ++item) {
      takes_piece();
      if (!piece.count) continue;
      const int64_t row = static_cast<int64_t>(piece.expert) * kOutRows + item % kRowBlocks * kItemRows;
      const Matrix &first = kGate ? call.w1 : call.w2, &second = kGate ? call.w3 : call.w2;
      const uint8_t* from = (row_in_stage < 32 ? first.codes : second.codes) +
                            (row + (kGate ? row_in_stage % 32 : row_in_stage)) * (kColumns / 2);
      for (int step = 0; step < L::kSteps; ++step, next()) {
        ptx::barrier_wait(empty + stage, phase ^ 1);
        if (warp == 0 && lane == 0) {
          ptx::barrier_arrive_expect(full + stage, kRows * kStageColumns / 2 + (step ? 0 : L::kScaleBytes));
        }
        if (lane < 16) {
          ptx::copy_bulk_once(shared + stage * kStageBytes + row_in_stage * kStagePitch,
                              from + step * (kStageColumns / 2), kStageColumns / 2, full + stage, policy);
        } else if (lane == 16 && warp < 2 && step == 0) {
          const uint8_t* scale =
              (warp ? second.scale : first.scale) + (warp && !kGate ? row + 32 : row) * (kColumns / 32);
          ptx::copy_bulk(shared + L::kScales + buffer * L::kScaleBytes + warp * (L::kScaleBytes / 2), scale,
                         L::kScaleBytes / 2, full + stage);
        }
        if (step == 0 && ++buffer == L::kScaleBuffers) buffer = 0;
        __syncwarp();
      }
    }
    return;
  }

  const int lane = threadIdx.x % 32, c = lane % 4, warpgroup = threadIdx.x / 128, row = threadIdx.x % 128 / 32 * 16;
  constexpr int kGroups = kStageColumns / 32 / kWarpgroups;
  const uint32_t tokens = ptx::shared_address(shared + L::kTokens);
  float* sums = reinterpret_cast<float*>(shared + L::kSums);
  float* largest_of = reinterpret_cast<float*>(shared + L::kLargest);
  int32_t* entries = reinterpret_cast<int32_t*>(shared + L::kEntries);
  float* shares = reinterpret_cast<float*>(shared + L::kShares);
  int sums_buffer = 0;
  bool has_tokens = false;
  float inverse[2] = {};
  if (!kGate) ptx::grid_wait();
  for (; item < last; ++item) {
    const bool is_first = takes_piece();
    if (!piece.count) continue;
    if (is_first) {
      group_sync<kThreads>();
      if (static_cast<int>(threadIdx.x) < piece.count) {
        const int entry = call.routes.slots ? call.routes.list[piece.begin + threadIdx.x] : piece.begin;
        entries[threadIdx.x] = entry;
        if (!kGate) shares[threadIdx.x] = call.weights[entry] / call.inner_scale;
      }
      group_sync<kThreads>();
      // A single token is the same for all its experts.
      if (kGate && (!has_tokens || call.routes.slots)) {
        const auto row = [&](int t) {
          return reinterpret_cast<const uint4*>(call.x + static_cast<int64_t>(entries[t] / call.k) * kColumns);
        };
        load_tokens<kColumns, kThreads, __nv_bfloat16>(piece.count, row, shared + L::kTokens, largest_of, inverse);
      } else if (!kGate) {
        const auto row = [&](int t) {
          return reinterpret_cast<const uint4*>(call.inner + static_cast<int64_t>(entries[t]) * kColumns);
        };
        load_tokens<kColumns, kThreads, __half>(piece.count, row, shared + L::kTokens, largest_of, inverse);
      }
      has_tokens = true;
    }
    float sum[2][2] = {};
    const uint8_t* scale =
        shared + L::kScales + buffer * L::kScaleBytes + (row + lane / 4) * (kColumns / 32) + warpgroup * kGroups;
    for (int step = 0; step < L::kSteps; ++step, next()) {
      ptx::barrier_wait(full + stage, phase);
      // Matrices 0, 1: the 16 rows of a group, 2, 3: of the next.
      const uint32_t codes = ptx::shared_address(shared + stage * kStageBytes) + (row + lane % 16) * kStagePitch +
                             (warpgroup * kGroups + lane / 16) * 16;
      const int group = step * (kStageColumns / 32) + warpgroup * kGroups;
      if (piece.count <= 4) {
        multiply_groups<8, kGroups>(codes, scale + step * (kStageColumns / 32), kColumns / 32,
                                    tokens + group * 2 * 8 * 16, sum);
      } else {
        multiply_groups<16, kGroups>(codes, scale + step * (kStageColumns / 32), kColumns / 32,
                                     tokens + group * 2 * 16 * 16, sum);
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(empty + stage);
    }
    if (++buffer == L::kScaleBuffers) buffer = 0;
    float* own = sums + (sums_buffer * kWarpgroups + warpgroup) * kRows * kPieceTokens;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int w = 0; w < 2; ++w) own[(4 * w + c) * kRows + row + lane / 4 + 8 * h] = sum[h][w] * inverse[w];
    }
    group_sync<kThreads>();
    const float* all = sums + sums_buffer * kWarpgroups * kRows * kPieceTokens;
    for (int i = threadIdx.x; i < kItemRows * piece.count; i += kThreads) {
      const int t = i / kItemRows, r = i % kItemRows;
      float total[2] = {};
#pragma unroll
      for (int w = 0; w < kWarpgroups; ++w) {
        total[0] += all[(w * kPieceTokens + t) * kRows + r];
        if (kGate) total[1] += all[(w * kPieceTokens + t) * kRows + r + 32];
      }
      const int64_t at = static_cast<int64_t>(entries[t]) * kOutRows + item % kRowBlocks * kItemRows + r;
      if (kGate) {
        call.inner[at] = __float2half_rn(swiglu(total[0], total[1], call.limit) * call.inner_scale);
      } else {
        call.each[at] = total[0] * shares[t];
      }
    }
    sums_buffer ^= 1;
  }
}

}  // namespace dsv4::experts

#endif  // DSV4_EXPERTS_FEW_TOKENS_CUH_
