// The k best of a token's scores, exactly: equal ones by lower index, in the order of their index.
#ifndef DSV4_SELECT_TOP_K_CUH_
#define DSV4_SELECT_TOP_K_CUH_

#include <cstdint>

#include "select/scores.cuh"

namespace dsv4::select_sm90 {

constexpr int kTopThreads = 1024, kTopWarps = kTopThreads / 32;
constexpr int kBins = 2 * kTopThreads;
constexpr int kEach = 16;  // values of a thread at a time
constexpr int kRound = kEach * kTopThreads;
constexpr int kMostK = 2048;
constexpr int kCandidates = 4096;
constexpr int kTopBytes = kCandidates * 8;

// What the threads of a block share while they choose.
struct Choice {
  uint32_t bins[kBins];
  uint32_t lows[kTopWarps], highs[kTopWarps], counts[kTopWarps];  // of the warps
  uint32_t bins_of[kTopWarps], listed[kTopWarps], above[kTopWarps], same[kTopWarps];
  uint32_t bin, before, in_bin;
  int32_t groups[kMostK];
};

__device__ __forceinline__ uint32_t sum_of_warp(uint32_t x) { return __reduce_add_sync(0xFFFFFFFFu, x); }

// The sum over the lanes up to this one.
__device__ __forceinline__ uint32_t sum_to_lane(uint32_t x) {
#pragma unroll
  for (int i = 1; i < 32; i *= 2) {
    const uint32_t other = __shfl_up_sync(0xFFFFFFFFu, x, i);
    if (threadIdx.x % 32 >= i) x += other;
  }
  return x;
}

// The least and the largest of some values, 0 excepted, and how many there are.
struct Range {
  uint32_t low, high, count;
};

// Of the block's values; each(f) gives this thread's to f.
template <typename Each>
__device__ __forceinline__ Range range_of(const Each& each, Choice& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t low = 0xFFFFFFFFu, high = 0, count = 0;
  each([&](uint32_t value) {
    high = max(high, value), low = min(low, value - 1), count += value != 0;  // 0 - 1 is the largest
  });
  low = __reduce_min_sync(0xFFFFFFFFu, low), high = __reduce_max_sync(0xFFFFFFFFu, high);
  count = sum_of_warp(count);
  if (lane == 0) shared.lows[warp] = low, shared.highs[warp] = high, shared.counts[warp] = count;
  __syncthreads();
  return {__reduce_min_sync(0xFFFFFFFFu, shared.lows[lane]) + 1, __reduce_max_sync(0xFFFFFFFFu, shared.highs[lane]),
          sum_of_warp(shared.counts[lane])};
}

// Chosen are the values above `least`, and of those equal to it the first `equal`.
struct Cut {
  uint32_t least, equal;
};

// The cut for the k largest of the block's values, all of them in the range; for up to `slack` more than k where that
// is found sooner. All values where there are no more than k. The bins are 0, before and after.
template <typename Each>
__device__ __forceinline__ Cut find_cut(const Each& each, Range range, uint32_t k, uint32_t slack, Choice& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (range.count <= k) return {0, 0};
  uint32_t low = range.low, high = range.high, wanted = k;
  while (true) {
    // The k-th largest is the wanted-th in [low, high]; bins are from the top.
    const int shift = max(0, 21 - __clz(high - low));  // (high - low) >> shift < kBins
    each([&](uint32_t value) {
      if (value >= low && value <= high) atomicAdd(&shared.bins[(high - value) >> shift], 1u);
    });
    __syncthreads();
    auto* mine = reinterpret_cast<uint2*>(shared.bins) + threadIdx.x;
    const uint2 two = *mine;
    *mine = uint2{};
    const uint32_t of_warp = sum_of_warp(two.x + two.y);
    if (lane == 0) shared.bins_of[warp] = of_warp;
    __syncthreads();
    const uint32_t before_warp = sum_of_warp(lane < warp ? shared.bins_of[lane] : 0);
    if (before_warp < wanted && wanted <= before_warp + of_warp) {
      const uint32_t to = before_warp + sum_to_lane(two.x + two.y), middle = to - two.y, from = middle - two.x;
      if (from < wanted && wanted <= middle) shared.bin = 2 * threadIdx.x, shared.before = from, shared.in_bin = two.x;
      if (middle < wanted && wanted <= to)
        shared.bin = 2 * threadIdx.x + 1, shared.before = middle, shared.in_bin = two.y;
    }
    __syncthreads();
    const uint32_t top = high - (shared.bin << shift), width = (1u << shift) - 1;
    low = top - low > width ? top - width : low, high = top;
    wanted -= shared.before;
    if (shared.in_bin <= wanted + slack) return {low - 1, 0};  // all of the bin
    if (low == high) return {low, wanted};
  }
}

// The k largest of n values (0: none) in the range, equal ones by lower index: give(rank, index) for each, ranks in the
// order of the index. at(i): value i. Returns the cut, *chosen: how many.
template <typename At, typename Give>
__device__ __forceinline__ Cut choose(int n, const At& at, Range range, uint32_t k, Choice& shared, int* chosen,
                                      const Give& give) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Cut cut = find_cut(
      [&](const auto& f) {
        for (int i = threadIdx.x; i < n; i += kTopThreads) f(at(i));
      },
      range, k, 0, shared);
  const uint32_t least = cut.least, equal = cut.equal;
  // Every warp has a run of the values.
  const int run = (n + 32 * kTopWarps - 1) / (32 * kTopWarps) * 32;
  const int from = min(warp * run, n), to = min(from + run, n);
  uint32_t above = 0, same = 0;
  for (int i = from + lane; i < to; i += 32) {
    const uint32_t value = at(i);
    above += value > least, same += equal && value == least;
  }
  above = sum_of_warp(above), same = sum_of_warp(same);
  if (lane == 0) shared.above[warp] = above, shared.same[warp] = same;
  __syncthreads();
  const uint32_t of_lane = shared.above[lane];
  *chosen = static_cast<int>(sum_of_warp(of_lane) + equal);
  uint32_t above_before = sum_of_warp(lane < warp ? of_lane : 0);
  uint32_t same_before = equal ? sum_of_warp(lane < warp ? shared.same[lane] : 0) : 0;
  for (int base = from; base < to; base += 32) {
    const uint32_t value = base + lane < to ? at(base + lane) : 0;
    const uint32_t greater = __ballot_sync(0xFFFFFFFFu, value > least);
    const uint32_t equals = __ballot_sync(0xFFFFFFFFu, equal && value == least);
    const uint32_t below = (1u << lane) - 1, same_here = same_before + __popc(equals & below);
    if (value > least || ((equals >> lane & 1) && same_here < equal)) {
      give(above_before + __popc(greater & below) + min(same_here, equal), base + lane);
    }
    above_before += __popc(greater), same_before += __popc(equals);
  }
  return cut;
}

// Four values from index i on, 0 from n on.
__device__ __forceinline__ uint4 load_four(const uint32_t* from, int i, int n) {
  uint4 four = i < n ? __ldcg(reinterpret_cast<const uint4*>(from + i)) : uint4{};
  if (i + 1 >= n) four.y = 0;
  if (i + 2 >= n) four.z = 0;
  if (i + 3 >= n) four.w = 0;
  return four;
}

// As `choose`, for values that are mostly far from being chosen: load(i) gives four from index i on (0 from n on). At
// least k of them are above `bound`, and none is above *high; where *high is 0 both follow from `best`, the best of
// every kGroup of at most kRound values, or without it from the best of every eight, or where k is large from all.
template <typename Load, typename At, typename Give>
__device__ __forceinline__ Cut choose_few(int n, const Load& load, const At& at, const uint32_t* best, uint32_t k,
                                          uint32_t bound, uint32_t* high, Choice& shared, uint32_t* list, int* chosen,
                                          const Give& give) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int rounds = (n + kRound - 1) / kRound;
  // A warp's values are a run; of each quarter of it every lane has four.
  const auto index = [&](int round, int quarter) {
    return round * kRound + warp * 32 * kEach + quarter * 128 + 4 * lane;
  };
  uint4 v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = load(index(0, i));
  if (*high == 0 && (best != nullptr || (rounds == 1 && n > kCandidates && n < 10 * static_cast<int>(k)))) {
    // While the values are on their way.
    const uint32_t mine = best && threadIdx.x < (n + kGroup - 1) / kGroup ? __ldcg(best + threadIdx.x) : 0;
    const auto each = [&](const auto& f) {
      if (best) return f(mine);
#pragma unroll
      for (int i = 0; i < 4; ++i) f(v[i].x), f(v[i].y), f(v[i].z), f(v[i].w);
    };
    const Range range = range_of(each, shared);
    const Cut cut = find_cut(each, range, k, k / 8, shared);
    bound = cut.least - (cut.equal != 0), *high = range.high;
  } else if (*high == 0) {
    const auto most_of = [](uint4 x) { return max(max(x.x, x.y), max(x.z, x.w)); };
    uint32_t first = max(most_of(v[0]), most_of(v[1])), second = max(most_of(v[2]), most_of(v[3]));
    for (int round = 1; round < rounds; ++round) {
      first = max(first, max(most_of(load(index(round, 0))), most_of(load(index(round, 1)))));
      second = max(second, max(most_of(load(index(round, 2))), most_of(load(index(round, 3)))));
    }
    const auto each = [&](const auto& f) { f(first), f(second); };
    const Range range = range_of(each, shared);
    const Cut cut = find_cut(each, range, k, k / 8, shared);
    bound = cut.least - (cut.equal != 0), *high = range.high;
  }
  uint32_t listed = 0;
  for (int round = 0; round < rounds; ++round) {
    if (round) {
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = load(index(round, i));
      __syncthreads();
    }
    uint32_t mine = 0;  // how many of the four quarters' values are listed, a byte each
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mine += ((v[i].x > bound) + (v[i].y > bound) + (v[i].z > bound) + (v[i].w > bound)) << 8 * i;
    }
    const uint32_t to = sum_to_lane(mine), of_warp = __shfl_sync(0xFFFFFFFFu, to, 31);  // at most 128 a byte
    if (lane == 0) shared.listed[warp] = __dp4a(of_warp, 0x01010101u, 0u);
    __syncthreads();
    const uint32_t of_lane = shared.listed[lane];
    uint32_t quarter = listed + sum_of_warp(lane < warp ? of_lane : 0);
    listed += sum_of_warp(of_lane);
    if (listed > kCandidates) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t place = quarter + ((to - mine) >> 8 * i & 0xFF);
      quarter += of_warp >> 8 * i & 0xFF;
      const uint32_t each[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const bool is_listed = each[j] > bound;
        if (is_listed) list[place] = each[j];
        if (is_listed) list[kCandidates + place] = index(round, i) + j;
        place += is_listed;
      }
    }
  }
  __syncthreads();
  if (listed > kCandidates) {
    const Range range = range_of(
        [&](const auto& f) {
          for (int i = threadIdx.x; i < n; i += kTopThreads) f(at(i));
        },
        shared);
    return choose(n, at, range, k, shared, chosen, give);
  }
  return choose(
      listed, [&](int i) { return list[i]; }, {bound + 1, *high, listed}, k, shared, chosen,
      [&](int rank, int i) { give(rank, list[kCandidates + i]); });
}

// Chooses for a piece's tokens: one a block.
__global__ void __launch_bounds__(kTopThreads, 1) top_k_kernel(SelectCall call, Piece piece) {
  extern __shared__ uint32_t list[];
  __shared__ Choice shared;
  const int64_t token = piece.first + blockIdx.x;
  const int32_t slot = call.slots[token], n = call.visible(token), k = static_cast<int>(call.k);
  int32_t* out = call.selected + token * k;
  reinterpret_cast<uint2*>(shared.bins)[threadIdx.x] = uint2{};
  ptx::grid_wait();  // for the scores
  if (n <= k) {
    for (int i = threadIdx.x; i < k; i += kTopThreads) out[i] = i < n && call.key_row(slot, i) >= 0 ? i : -1;
    return;
  }
  const uint32_t* scores = call.scratch + blockIdx.x * call.scratch_row;
  const uint32_t* best = scores + call.scratch_row / (kGroup + 1) * kGroup;
  const int all = (n + kGroup - 1) / kGroup;
  uint32_t high = 0;
  int found;
  if (n <= kCandidates) {
    const uint4 four = load_four(scores, 4 * threadIdx.x, n);
    reinterpret_cast<uint4*>(list)[threadIdx.x] = four;
    const Range range = range_of([&](const auto& f) { f(four.x), f(four.y), f(four.z), f(four.w); }, shared);
    choose(n, [&](int i) { return list[i]; }, range, k, shared, &found, [&](int rank, int i) { out[rank] = i; });
  } else if (n <= kRound) {
    choose_few(
        n, [&](int i) { return load_four(scores, i, n); }, [&](int i) { return __ldcg(scores + i); },
        all >= 3 * k / 2 ? best : nullptr, k, 0, &high, shared, list, &found, [&](int rank, int i) { out[rank] = i; });
  } else {
    // An entry among the k best is in one of the k groups with the best: each of these has one before it otherwise.
    int groups;
    const Cut cut = choose_few(
        all, [&](int i) { return load_four(best, i, all); }, [&](int i) { return __ldcg(best + i); }, nullptr, k, 0,
        &high, shared, list, &groups, [&](int rank, int i) { shared.groups[rank] = i; });
    __syncthreads();
    const auto place = [&](int i) { return shared.groups[i / kGroup] * kGroup + i % kGroup; };
    choose_few(
        groups * kGroup,
        [&](int i) {
          return i < groups * kGroup ? __ldcg(reinterpret_cast<const uint4*>(scores + place(i))) : uint4{};
        },
        [&](int i) { return __ldcg(scores + place(i)); }, nullptr, k, cut.least - (cut.equal != 0), &high, shared, list,
        &found, [&](int rank, int i) { out[rank] = place(i); });
  }
  for (int i = found + threadIdx.x; i < k; i += kTopThreads) out[i] = -1;
}

}  // namespace dsv4::select_sm90

#endif  // DSV4_SELECT_TOP_K_CUH_
