// Finishing an entry of 512 channels that lies in the registers of 256 threads, two neighbouring channels in each: RMSNorm,
// RoPE and the FP8 record, in the order of operations of rms_norm_rope.h.
#ifndef DSV4_ENTRY_OF_PAIRS_CUH_
#define DSV4_ENTRY_OF_PAIRS_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress.h"
#include "float_math.h"
#include "quantise_warp.cuh"

namespace dsv4 {

constexpr int kEntryDim = 512, kEntryRopeDim = 64, kEntryNopeDim = kEntryDim - kEntryRopeDim;
constexpr int kEntryWarps = kEntryDim / 64;

// Two neighbouring values as loaded, read once.
template <typename T>
struct Pair;

template <>
struct Pair<float> {
  float2 v;
  __device__ __forceinline__ void load(const void* base, int64_t offset) {
    v = __ldcs(reinterpret_cast<const float2*>(static_cast<const float*>(base) + offset));
  }
  __device__ __forceinline__ float2 values() const { return v; }
};

template <>
struct Pair<BFloat16> {
  uint32_t v;
  __device__ __forceinline__ void load(const void* base, int64_t offset) {
    v = __ldcs(reinterpret_cast<const uint32_t*>(static_cast<const BFloat16*>(base) + offset));
  }
  __device__ __forceinline__ float2 values() const { return make_float2(float_of(v << 16), float_of(v & 0xFFFF0000u)); }
};

// Memory that the threads which finish an entry share.
struct EntryScratch {
  alignas(16) float squares[kEntryWarps];
  alignas(16) uint32_t amax[kEntryWarps];
};

// What finishing an entry needs besides its values, fetched before it is needed.
struct PairConstants {
  float2 weight;
  float cos, sin;

  __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread) {
    weight = __ldg(reinterpret_cast<const float2*>(call.norm) + thread);
    if (thread < kEntryNopeDim / 2) return;
    const int64_t pair = window * (kEntryRopeDim / 2) + thread - kEntryNopeDim / 2;
    cos = __ldg(call.cos + pair);
    sin = __ldg(call.sin + pair);
  }
};

// All 256 threads call together; `scratch` is free again when the next barrier is passed.
__device__ __forceinline__ void finish_entry(const Compress& call, const RecordRows& record, const PairConstants& constants,
                                             int64_t row, int thread, float2 v, EntryScratch* scratch) {
  // Squares: quads of neighbouring channels, which two threads share, then pairs of sums.
  const float own_a = v.x * v.x, own_b = v.y * v.y;
  const float other_a = __shfl_xor_sync(0xFFFFFFFFu, own_a, 1), other_b = __shfl_xor_sync(0xFFFFFFFFu, own_b, 1);
  const bool is_odd = thread & 1;
  const float first = is_odd ? other_a + other_b : own_a + own_b;
  float squares = (first + (is_odd ? own_a : other_a)) + (is_odd ? own_b : other_b);
#pragma unroll
  for (int step = 2; step < 32; step *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
  if (thread % 32 == 0) scratch->squares[thread / 32] = squares;
  __syncthreads();
  static_assert(kEntryWarps == 8, "the tree over warps");
  const float4 low = *reinterpret_cast<const float4*>(scratch->squares);
  const float4 high = *reinterpret_cast<const float4*>(scratch->squares + 4);
  squares = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
  const float scale = inverse_sqrt(squares * (1.0f / kEntryDim) + call.eps);
  v = make_float2(v.x * scale * constants.weight.x, v.y * scale * constants.weight.y);
  const bool is_rope = thread >= kEntryNopeDim / 2;
  if (is_rope) {
    v = make_float2(v.x * constants.cos - v.y * constants.sin, v.x * constants.sin + v.y * constants.cos);
    const uint32_t words = to_bf16(v.x).bits | (static_cast<uint32_t>(to_bf16(v.y).bits) << 16);
    *reinterpret_cast<uint32_t*>(record.rope + row * kEntryRopeDim + 2 * (thread - kEntryNopeDim / 2)) = words;
  }
  const uint32_t amax = is_rope ? 0u : max(magnitude_bits(v.x), magnitude_bits(v.y));
  uint32_t codes;
  if (record.scales) {  // a warp has a group of 64 channels, the last warp the RoPE part
    const GroupEncoder<32> encoder(amax);
    codes = encoder.encode(v.x, v.y, 0.0f, 0.0f);
    if (thread % 32 == 0) record.scales[row * kEntryWarps + thread / 32] = is_rope ? 0 : encoder.scale();
  } else {
    const uint32_t in_warp = __reduce_max_sync(0xFFFFFFFFu, amax);
    if (thread % 32 == 0) scratch->amax[thread / 32] = in_warp;
    __syncthreads();
    const uint4 a = *reinterpret_cast<const uint4*>(scratch->amax), b = *reinterpret_cast<const uint4*>(scratch->amax + 4);
    const RowEncoder encoder(max(max(max(a.x, a.y), max(a.z, a.w)), max(max(b.x, b.y), max(b.z, b.w))));
    codes = encoder.encode(v.x, v.y, 0.0f, 0.0f);
    if (thread == 0) record.inv_scale[row] = encoder.inv_scale();
  }
  if (!is_rope) *reinterpret_cast<uint16_t*>(record.nope + row * kEntryNopeDim + 2 * thread) = static_cast<uint16_t>(codes);
}

}  // namespace dsv4

#endif  // DSV4_ENTRY_OF_PAIRS_CUH_
