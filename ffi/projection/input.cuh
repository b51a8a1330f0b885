// What a product reads: activations, and what becomes of them before they are multiplied.
#ifndef DSV4_PROJECTION_INPUT_CUH_
#define DSV4_PROJECTION_INPUT_CUH_

#include <cuda_bf16.h>

#include "cuda/weight_mma.cuh"

namespace dsv4::projection {

constexpr int kMostWeights = 3;

// x as it is; x / rms(x) * norm; or silu(min(x, limit)) * clip(up, -limit, limit). Both are rounded to bfloat16.
enum class Before { kNothing, kNorm, kSwiGLU };

// A weight of the call; its rows are first … first + rows - 1 of all.
struct Weight {
  const uint8_t* codes;  // (rows, columns)
  const uint8_t* scale;  // (rows / 128, columns / 128)
  __nv_bfloat16* y;      // (T, rows)
  int first, rows;
};

struct Call {
  const __nv_bfloat16* x;   // (T, groups, columns)
  const __nv_bfloat16* up;  // as x, or null
  const float* norm;        // (columns), or null
  float eps, limit;
  Weight weights[kMostWeights];
  int number;  // of weights; with more than one there is one group
  int tokens, groups, rows, columns;

  __device__ __forceinline__ Weight of_row(int row) const {
    Weight found = weights[0];
#pragma unroll
    for (int i = 1; i < kMostWeights; ++i) {
      if (i < number && row >= weights[i].first) found = weights[i];
    }
    return found;
  }
  // Where row (token, group) of x begins, in pieces of eight values.
  __device__ __forceinline__ int64_t row_of(int token, int group) const {
    return (static_cast<int64_t>(token) * groups + group) * (columns / 8);
  }
};

__device__ __forceinline__ float2 floats_of_pair(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
__device__ __forceinline__ float gated(float gate, float up, float limit) {
  // So written, a NaN stays one.
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate / (1.0f + __expf(-gate)) * up;
}

// Values 8 i … 8 i + 7 of the row at `row`, ready to be multiplied. `root`: 1 / rms(x) of the row.
template <Before kBefore>
__device__ __forceinline__ uint4 prepared(const Call& call, int64_t row, int i, float root) {
  uint4 v = __ldg(reinterpret_cast<const uint4*>(call.x) + row + i);
  if constexpr (kBefore == Before::kNothing) return v;
  float4 first = {}, second = {};
  uint4 up = {};
  if constexpr (kBefore == Before::kNorm) {
    first = __ldg(reinterpret_cast<const float4*>(call.norm) + 2 * i);
    second = __ldg(reinterpret_cast<const float4*>(call.norm) + 2 * i + 1);
  } else {
    up = __ldg(reinterpret_cast<const uint4*>(call.up) + row + i);
  }
  const auto pair = [&](uint32_t x, float low, float high, uint32_t other) {
    const float2 f = floats_of_pair(x);
    if constexpr (kBefore == Before::kNorm) return ptx::bfloat_pair(f.x * root * low, f.y * root * high);
    const float2 u = floats_of_pair(other);
    return ptx::bfloat_pair(gated(f.x, u.x, call.limit), gated(f.y, u.y, call.limit));
  };
  return make_uint4(pair(v.x, first.x, first.y, up.x), pair(v.y, first.z, first.w, up.y),
                    pair(v.z, second.x, second.y, up.z), pair(v.w, second.z, second.w, up.w));
}

// The largest magnitude of what a row becomes, and the sum of its squares where it is normed. Threads take parts.
template <Before kBefore>
struct Magnitude {
  uint32_t largest =
      0;  // of values as packed pairs of bfloat16, then of one; where x is normed of x * norm, as a float
  float squares = 0;

  __device__ __forceinline__ void take(const Call& call, int64_t row, int i) {
    if constexpr (kBefore == Before::kNorm) {
      const uint4 v = __ldg(reinterpret_cast<const uint4*>(call.x) + row + i);
      const float4 first = __ldg(reinterpret_cast<const float4*>(call.norm) + 2 * i);
      const float4 second = __ldg(reinterpret_cast<const float4*>(call.norm) + 2 * i + 1);
      const auto pair = [&](uint32_t x, float low, float high) {
        const float2 f = floats_of_pair(x);
        squares += f.x * f.x + f.y * f.y;
        largest = max(largest, max(__float_as_uint(fabsf(f.x * low)), __float_as_uint(fabsf(f.y * high))));
      };
      pair(v.x, first.x, first.y), pair(v.y, first.z, first.w);
      pair(v.z, second.x, second.y), pair(v.w, second.z, second.w);
    } else {
      const uint4 v = prepared<kBefore>(call, row, i, 1.0f);
      largest = larger_magnitudes(larger_magnitudes(largest, v.x), v.y);
      largest = larger_magnitudes(larger_magnitudes(largest, v.z), v.w);
    }
  }
  __device__ __forceinline__ void reduce_warp() {
    if constexpr (kBefore == Before::kNorm) {
#pragma unroll
      for (int d = 16; d > 0; d /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, d);
    } else {
      largest = max(largest & 0xFFFFu, largest >> 16);
    }
    largest = __reduce_max_sync(0xFFFFFFFFu, largest);
  }
  __device__ __forceinline__ void add(uint32_t other_largest, float other_squares) {
    largest = max(largest, other_largest), squares += other_squares;
  }
  __device__ __forceinline__ float root(const Call& call) const {
    return kBefore == Before::kNorm ? rsqrtf(squares / static_cast<float>(call.columns) + call.eps) : 1.0f;
  }
  // As the bits of a bfloat16, not rounded down.
  __device__ __forceinline__ uint32_t bits(float root) const {
    if constexpr (kBefore != Before::kNorm) return largest;
    return (__float_as_uint(__uint_as_float(largest) * root) + 0xFFFFu) >> 16;
  }
};

}  // namespace dsv4::projection

#endif  // DSV4_PROJECTION_INPUT_CUH_
