// The k best of a token's scores, exactly: equal ones by lower index, in the order of their index.
#ifndef DSV4_SELECT_TOP_K_CUH_
#define DSV4_SELECT_TOP_K_CUH_

#include <cstdint>

#include "select/scores.cuh"

namespace dsv4::select_sm90 {

constexpr int kTopThreads = 1024, kTopWarps = kTopThreads / 32;
constexpr int kBins = 2 * kTopThreads;
constexpr int kDirect = 16384;     // scores among which is chosen at once
constexpr int kMostK = 2048;
constexpr int kMostValues = 49152;  // that shared memory has room for

// What the threads of a block share while they choose.
struct Choice {
  uint32_t bins[kBins];
  uint32_t lows[kTopWarps], highs[kTopWarps], counts[kTopWarps], more[kTopWarps];
  uint32_t bin, above, in_bin;
};

// Values that shared memory must hold for the k best of n scores.
inline int values_of(int64_t n, int64_t k) {
  const int64_t groups = (n + kGroup - 1) / kGroup, all = groups * kGroup;
  const int64_t most = std::max(std::min<int64_t>(all, kDirect), std::max(groups, std::min(all, k * kGroup)));
  return static_cast<int>((most + 31) / 32 * 32);
}

// The sum of `mine` over the threads before this one, of a block; *total: over all.
__device__ __forceinline__ uint32_t sum_before(uint32_t mine, uint32_t* warps, uint32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t sum = mine;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, sum, i);
    if (lane >= i) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  uint32_t before = lane < kTopWarps ? warps[lane] : 0;
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, before, i);
    if (lane >= i) before += other;
  }
  *total = __shfl_sync(0xFFFFFFFFu, before, 31);
  before = __shfl_sync(0xFFFFFFFFu, before, warp ? warp - 1 : 0);
  __syncthreads();
  return sum - mine + (warp ? before : 0);
}

// Of n values in shared memory (0: none) the k largest, equal ones by lower index: give(rank, index) for each, ranks in
// the order of the index. Returns how many. low, high, count: over this thread's share of the values, whichever that is,
// the least and largest of those that are not 0 (0xFFFFFFFF and 0 where there are none), and how many there are.
template <typename Give>
__device__ __forceinline__ int choose(const uint32_t* values, int n, uint32_t k, uint32_t low, uint32_t high,
                                      uint32_t count, Choice& shared, const Give& give) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  low = __reduce_min_sync(0xFFFFFFFFu, low), high = __reduce_max_sync(0xFFFFFFFFu, high);
  count = __reduce_add_sync(0xFFFFFFFFu, count);
  if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high, shared.counts[warp] = count;
  shared.bins[threadIdx.x] = shared.bins[threadIdx.x + kTopThreads] = 0;
  __syncthreads();  // values are there too
  low = __reduce_min_sync(0xFFFFFFFFu, shared.lows[lane]);
  high = __reduce_max_sync(0xFFFFFFFFu, shared.highs[lane]);
  const uint32_t total = __reduce_add_sync(0xFFFFFFFFu, shared.counts[lane]);

  // Chosen are the values above `least`, and of those equal to it the first `equal`.
  uint32_t least = 0, equal = 0, wanted = k;
  if (total > k) {
    while (true) {
      // The k-th largest is the wanted-th in [low, high]; bins are from the top.
      const uint32_t range = high - low;
      const int shift = max(0, 21 - __clz(range));  // range >> shift < 2048
      for (int i = threadIdx.x; i < n; i += kTopThreads) {
        const uint32_t value = values[i];
        if (value >= low && value <= high) atomicAdd(&shared.bins[(high - value) >> shift], 1u);
      }
      __syncthreads();
      const uint32_t first = shared.bins[2 * threadIdx.x], second = shared.bins[2 * threadIdx.x + 1];
      uint32_t sum;
      const uint32_t before = sum_before(first + second, shared.more, &sum);
      if (before < wanted && wanted <= before + first) {
        shared.bin = 2 * threadIdx.x, shared.above = before, shared.in_bin = first;
      } else if (before + first < wanted && wanted <= before + first + second) {
        shared.bin = 2 * threadIdx.x + 1, shared.above = before + first, shared.in_bin = second;
      }
      shared.bins[2 * threadIdx.x] = shared.bins[2 * threadIdx.x + 1] = 0;
      __syncthreads();
      const uint32_t top = high - (shared.bin << shift), in_bin = shared.in_bin;
      const uint32_t bottom = shift && top - low >= (1u << shift) ? top - (1u << shift) + 1 : shift ? low : top;
      wanted -= shared.above;
      low = bottom, high = top;
      if (in_bin == wanted) {
        least = bottom - 1, equal = 0;  // all of the bin
        break;
      }
      if (bottom == top) {
        least = top, equal = wanted;
        break;
      }
    }
  }

  // In the order of the index: every warp has a run of the values.
  const int run = (n + 32 * kTopWarps - 1) / (32 * kTopWarps) * 32;
  const int from = min(warp * run, n), to = min(from + run, n);
  uint32_t above = 0, same = 0;
  for (int i = from + lane; i < to; i += 32) {
    const uint32_t value = values[i];
    above += value > least, same += value == least;
  }
  above = __reduce_add_sync(0xFFFFFFFFu, above), same = equal ? __reduce_add_sync(0xFFFFFFFFu, same) : 0;
  if (lane == 0) shared.counts[warp] = above, shared.more[warp] = same;
  __syncthreads();
  uint32_t above_before = lane < warp ? shared.counts[lane] : 0, same_before = lane < warp ? shared.more[lane] : 0;
  above_before = __reduce_add_sync(0xFFFFFFFFu, above_before);
  same_before = __reduce_add_sync(0xFFFFFFFFu, same_before);
  for (int base = from; base < to; base += 32) {
    const uint32_t value = base + lane < to ? values[base + lane] : 0;
    const uint32_t greater = __ballot_sync(0xFFFFFFFFu, value > least);
    const uint32_t equals = equal ? __ballot_sync(0xFFFFFFFFu, value == least && base + lane < to) : 0;
    const uint32_t below = (1u << lane) - 1;
    const uint32_t same_here = same_before + __popc(equals & below);
    const bool chosen = value > least || ((equals >> lane & 1) && same_here < equal);
    if (chosen) give(above_before + __popc(greater & below) + min(same_here, equal), base + lane);
    above_before += __popc(greater), same_before += __popc(equals);
  }
  return static_cast<int>(min(total, k));
}

// Chooses for a piece's tokens: one a block.
__global__ void __launch_bounds__(kTopThreads, 1) top_k_kernel(SelectCall call, Piece piece) {
  extern __shared__ uint32_t values[];
  __shared__ Choice shared;
  __shared__ int32_t groups[kMostK];
  const int64_t token = piece.first + blockIdx.x;
  const int32_t slot = call.slots[token], n = call.visible(token), k = static_cast<int>(call.k);
  int32_t* out = call.selected + token * k;
  asm volatile("griddepcontrol.wait;" ::: "memory");  // for the scores
  if (n <= k) {
    for (int i = threadIdx.x; i < k; i += kTopThreads) out[i] = i < n && call.key_row(slot, i) >= 0 ? i : -1;
    return;
  }
  const uint32_t* scores = call.scratch + blockIdx.x * call.scratch_row;
  const uint32_t* best = scores + call.scratch_row / (kGroup + 1) * kGroup;
  const int all = (n + kGroup - 1) / kGroup;

  uint32_t low = 0xFFFFFFFFu, high = 0, count = 0;
  const auto put = [&](int i, uint4 four) {
    *reinterpret_cast<uint4*>(values + i) = four;
    const uint32_t each[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      high = max(high, each[j]), low = min(low, each[j] - 1), count += each[j] != 0;  // 0 is the largest here
    }
  };
  const auto lowest = [&] { return low == 0xFFFFFFFFu ? low : low + 1; };
  const bool in_groups = all * kGroup > kDirect && all > k;
  int chosen = all;
  if (in_groups) {
    // An entry among the k best is in one of the k groups with the best: each of these has one before it otherwise.
    for (int i = 4 * threadIdx.x; i < all; i += 4 * kTopThreads) {
      uint4 four = __ldcg(reinterpret_cast<const uint4*>(best + i));
      if (i + 1 >= all) four.y = 0;
      if (i + 2 >= all) four.z = 0;
      if (i + 3 >= all) four.w = 0;
      put(i, four);
    }
    chosen = choose(values, all, k, lowest(), high, count, shared, [&](int rank, int i) { groups[rank] = i; });
    __syncthreads();
    low = 0xFFFFFFFFu, high = 0, count = 0;
  }
  for (int i = 4 * threadIdx.x; i < chosen * kGroup; i += 4 * kTopThreads) {
    const int at = in_groups ? groups[i / kGroup] * kGroup + i % kGroup : i;
    put(i, __ldcg(reinterpret_cast<const uint4*>(scores + at)));
  }
  const int found = choose(values, chosen * kGroup, k, lowest(), high, count, shared, [&](int rank, int i) {
    out[rank] = in_groups ? groups[i / kGroup] * kGroup + i % kGroup : i;
  });
  for (int i = found + threadIdx.x; i < k; i += kTopThreads) out[i] = -1;
}

}  // namespace dsv4::select_sm90

#endif  // DSV4_SELECT_TOP_K_CUH_
