// The FP8 records on the device: one warp quantises one row that lies in its registers.
#ifndef DSV4_QUANTISE_WARP_CUH_
#define DSV4_QUANTISE_WARP_CUH_

#include <cstdint>

#include "cuda/ptx.cuh"
#include "formats/quantise.h"

namespace dsv4 {

// E4M3 codes of finite floats, the first in the low byte.
__device__ __forceinline__ uint32_t to_e4m3x2(float a, float b) {
#if __CUDA_ARCH__ >= 890
  return ptx::e4m3_pair(a, b);
#else
  return to_e4m3(a) | (to_e4m3(b) << 8);
#endif
}
__device__ __forceinline__ uint32_t to_e4m3x4(float a, float b, float c, float d) {
  return to_e4m3x2(a, b) | (to_e4m3x2(c, d) << 16);
}

// a / b from y, the float nearest to 1 / b: correctly rounded but for an ulp in rare cases next to a midpoint of two
// floats. Keeps the sign of zero.
__device__ __forceinline__ float divide(float a, float b, float y) {
  const float quotient = a * y;
  const float excess = fmaf(quotient, b, -a);
  return fmaf(-excess, y, quotient);
}

// Encodes values of a row.
class RowEncoder {
 public:
  // amax: the largest magnitude_bits of the row.
  __device__ __forceinline__ explicit RowEncoder(uint32_t amax) {
    finite_ = amax < kFloatInf;
    // Correctly rounded: a quotient by 448 = 7 * 2^6 is at least 1/14 ulp away from a midpoint.
    const float scale = divide(float_of(max(amax, kAmaxFloorBits)), kE4M3Max, 1.0f / kE4M3Max);
    inv_scale_ = finite_ ? scale : float_of(kFloatNaN);
    reciprocal_ = __frcp_rn(scale);
  }

  __device__ __forceinline__ float inv_scale() const { return inv_scale_; }

  // Codes of four values of the row, the first in the low byte. None of the rare wrong ulps of divide() lies at a
  // boundary between two codes: tests/ops/formats/test_fp8.py goes through all that could.
  __device__ __forceinline__ uint32_t encode(float a, float b, float c, float d) const {
    const uint32_t codes = to_e4m3x4(quotient(a), quotient(b), quotient(c), quotient(d));
    return finite_ ? codes : kE4M3NaN * 0x01010101u;
  }
  __device__ __forceinline__ uint32_t encode(float a, float b) const {
    return finite_ ? to_e4m3x2(quotient(a), quotient(b)) : kE4M3NaN * 0x0101u;
  }

 private:
  __device__ __forceinline__ float quotient(float x) const { return divide(x, inv_scale_, reciprocal_); }

  float inv_scale_, reciprocal_;
  bool finite_;
};

// The same for a group of 64 values with a power-of-two scale, in kLanes neighbouring lanes of a warp.
template <int kLanes>
class GroupEncoder {
 public:
  // lane_amax: the largest magnitude_bits of this lane's values. All 32 lanes call together.
  __device__ __forceinline__ explicit GroupEncoder(uint32_t lane_amax) {
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      lane_amax = max(lane_amax, __shfl_xor_sync(0xFFFFFFFFu, lane_amax, step));
    }
    scale_ = e8m0_scale_of(lane_amax);
    reciprocal_ = e8m0_reciprocal(scale_);
  }

  __device__ __forceinline__ uint8_t scale() const { return static_cast<uint8_t>(scale_); }

  __device__ __forceinline__ uint32_t encode(float a, float b, float c, float d) const {
    const uint32_t codes = to_e4m3x4(a * reciprocal_, b * reciprocal_, c * reciprocal_, d * reciprocal_);
    return scale_ == kE8M0NaN ? kE4M3NaN * 0x01010101u : codes;
  }
  __device__ __forceinline__ uint32_t encode(float a, float b) const {
    return scale_ == kE8M0NaN ? kE4M3NaN * 0x0101u : to_e4m3x2(a * reciprocal_, b * reciprocal_);
  }

 private:
  uint32_t scale_;
  float reciprocal_;
};

}  // namespace dsv4

#endif  // DSV4_QUANTISE_WARP_CUH_
