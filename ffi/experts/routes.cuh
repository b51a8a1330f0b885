// Routed experts on the GPU: what a call has, who picked which expert, and the sum over picks.
#ifndef DSV4_EXPERTS_ROUTES_CUH_
#define DSV4_EXPERTS_ROUTES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dsv4::experts {

struct Matrix {
  const uint8_t* codes;  // (E, rows, columns / 2)
  const uint8_t* scale;  // (E, rows, columns / 32)
};

// Which (token, pick) each expert has. Every expert in use has a slot; `list` holds token * k + pick, slot by slot.
struct Routes {
  const int32_t* slots;   // how many; null: there is one token, and its picks are the slots
  const int32_t* expert;  // of a slot
  const int32_t* begin;   // of a slot's part of `list`, one more than there are slots
  const int32_t* list;
  const int32_t* tiles;  // how many pieces of at most so many entries of a slot, then (slot, first entry) of each
};

struct Call {
  const __nv_bfloat16* x;  // (T, hidden)
  const int32_t* picks;    // (T, k)
  const float* weights;    // (T, k)
  Matrix w1, w2, w3;
  Routes routes;
  __half* inner;       // (T * k, inner), times `inner_scale`
  float* each;         // (T * k, hidden)
  __nv_bfloat16* out;  // (T, hidden)
  int experts, tokens, k, hidden, inner_size;
  float limit, inner_scale;
};

__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  // So written, a NaN stays one.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + __expf(-gate)) * up;
}

// The items of this block: a contiguous part, so that the tokens in shared memory seldom change.
__device__ __forceinline__ void own_items(int total, int* first, int* last) {
  *first = static_cast<int>(static_cast<int64_t>(total) * blockIdx.x / gridDim.x);
  *last = static_cast<int>(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x);
}

// A token's experts, added in the order of its picks.
__global__ void __launch_bounds__(256) sum_picks_kernel(const Call call) {
  const int hidden = call.hidden;
  ptx::grid_wait();
  const int token = blockIdx.y, at = (blockIdx.x * 256 + threadIdx.x) * 4;
  if (at >= hidden) return;
  float4 y = make_float4(0, 0, 0, 0);
  for (int pick = 0; pick < call.k; ++pick) {
    const int64_t entry = static_cast<int64_t>(token) * call.k + pick;
    const int expert = call.picks[entry];
    if (expert < 0 || expert >= call.experts) continue;
    const float4 v = *reinterpret_cast<const float4*>(call.each + entry * hidden + at);
    y.x += v.x, y.y += v.y, y.z += v.z, y.w += v.w;
  }
  __nv_bfloat162* to = reinterpret_cast<__nv_bfloat162*>(call.out + static_cast<int64_t>(token) * hidden + at);
  to[0] = __floats2bfloat162_rn(y.x, y.y);
  to[1] = __floats2bfloat162_rn(y.z, y.w);
}

// Groups (token, pick) by expert, in one block. Dynamic shared memory: 2 * (experts + 1) + 33 ints.
__global__ void __launch_bounds__(1024)
    route_kernel(const int32_t* picks, int entries, int experts, int32_t* slots, int32_t* expert_of, int32_t* begin,
                 int32_t* list, int32_t* tiles, int tile_tokens) {
  extern __shared__ int32_t counts[];
  ptx::grid_launch_dependents();
  int32_t* next = counts + experts;
  for (int e = threadIdx.x; e < experts; e += 1024) counts[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < entries; i += 1024) {
    const int e = picks[i];
    if (e >= 0 && e < experts) atomicAdd(counts + e, 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // experts in chunks of 32: where each begins, and its slot
    int total = 0, used = 0, pieces = 0;
    for (int first = 0; first < experts; first += 32) {
      const int e = first + threadIdx.x, count = e < experts ? counts[e] : 0;
      int sum = count;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, sum, d);
        if (static_cast<int>(threadIdx.x) >= d) sum += other;
      }
      const unsigned mask = __ballot_sync(0xFFFFFFFFu, count > 0);
      if (count) {
        const int slot = used + __popc(mask & ((1u << threadIdx.x) - 1));
        next[e] = begin[slot] = total + sum - count;
        expert_of[slot] = e;
      }
      const int own = (count + tile_tokens - 1) / tile_tokens;
      int piece = own;
      for (int d = 1; d < 32; d *= 2) {
        const int other = __shfl_up_sync(0xFFFFFFFFu, piece, d);
        if (static_cast<int>(threadIdx.x) >= d) piece += other;
      }
      const int own_first = pieces + piece - own;
      for (int i = 0; i < own; ++i) {
        tiles[1 + 2 * (own_first + i)] = used + __popc(mask & ((1u << threadIdx.x) - 1));
        tiles[2 + 2 * (own_first + i)] = i * tile_tokens;
      }
      pieces += __shfl_sync(0xFFFFFFFFu, piece, 31);
      total += __shfl_sync(0xFFFFFFFFu, sum, 31);
      used += __popc(mask);
    }
    if (threadIdx.x == 0) *slots = used, begin[used] = total, tiles[0] = pieces;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < entries; i += 1024) {
    const int e = picks[i];
    if (e >= 0 && e < experts) list[atomicAdd(next + e, 1)] = i;
  }
}

}  // namespace dsv4::experts

#endif  // DSV4_EXPERTS_ROUTES_CUH_
