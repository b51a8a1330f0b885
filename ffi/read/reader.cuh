// Reading a stored record or key in a warp.
#ifndef DSV4_READ_READER_CUH_
#define DSV4_READ_READER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/geometry.cuh"
#include "cuda/ptx.cuh"
#include "formats/dequantise.h"
#include "read/op.h"

namespace dsv4 {

// Four E4M3 codes, the first in the low byte, as floats.
__device__ __forceinline__ void decode_four(uint32_t codes, float (&x)[4]) {
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t halves = ptx::halves_of_e4m3(codes >> (16 * i));  // every E4M3 value is one of half precision too
    ptx::floats_of_halves(halves, &x[2 * i], &x[2 * i + 1]);
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = e4m3_value(codes >> (8 * i));
#endif
}

__device__ __forceinline__ uint4 words_of(const float (&x)[4]) {
  return make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
}

// What a lane loads of a vector and the 16 bytes it makes of that: eight values of bfloat16, or four of float.
template <typename Out>
struct Part;

template <>
struct Part<BFloat16> {
  uint4 raw;

  __device__ __forceinline__ void load_codes(const uint8_t* from) {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(from));
    raw = make_uint4(codes.x, codes.y, 0, 0);
  }
  __device__ __forceinline__ void load_rope(const BFloat16* from) { raw = __ldg(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ uint4 decode_codes(float scale) const {
    float a[4], b[4];
    decode_four(raw.x, a);
    decode_four(raw.y, b);
    return make_uint4(ptx::bfloat_pair(a[0] * scale, a[1] * scale), ptx::bfloat_pair(a[2] * scale, a[3] * scale),
                      ptx::bfloat_pair(b[0] * scale, b[1] * scale), ptx::bfloat_pair(b[2] * scale, b[3] * scale));
  }
  __device__ __forceinline__ uint4 decode_rope() const { return raw; }
};

template <>
struct Part<float> {
  uint2 raw;

  __device__ __forceinline__ void load_codes(const uint8_t* from) {
    raw.x = __ldg(reinterpret_cast<const uint32_t*>(from));
  }
  __device__ __forceinline__ void load_rope(const BFloat16* from) { raw = __ldg(reinterpret_cast<const uint2*>(from)); }
  __device__ __forceinline__ uint4 decode_codes(float scale) const {
    float x[4];
    decode_four(raw.x, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= scale;
    return words_of(x);
  }
  __device__ __forceinline__ uint4 decode_rope() const {
    return make_uint4(raw.x << 16, raw.x & 0xFFFF0000u, raw.y << 16, raw.y & 0xFFFF0000u);
  }
};

// The scale that belongs to value `at` of a row.
template <typename Form, typename Scale>
__device__ __forceinline__ Scale load_scale(const ReadRecords& call, int64_t row, int at) {
  if constexpr (sizeof(Scale) == 1) {
    return __ldg(static_cast<const uint8_t*>(call.scale) + row * call.scale_width + at / Form::kGroup);
  } else {
    return __ldg(static_cast<const float*>(call.scale) + row);
  }
}

__device__ __forceinline__ float scale_value(float scale) { return scale; }
__device__ __forceinline__ float scale_value(uint8_t scale) { return e8m0_value(scale); }

// One vector in a warp: loaded first, written when the loads of all of the warp's vectors are under way.
template <typename Form, typename Scale, typename Out>
struct RecordInWarp {
  static constexpr int kValues = 16 / sizeof(Out), kParts = Form::kDim / (32 * kValues);
  static_assert(kParts * 32 * kValues == Form::kDim && Form::kNope % kValues == 0, "every lane has whole parts");
  Part<Out> parts[kParts];
  Scale scales[sizeof(Scale) == 1 ? kParts : 1];

  __device__ __forceinline__ static int first_value(int part, int lane) { return (part * 32 + lane) * kValues; }

  __device__ __forceinline__ void load(const ReadRecords& call, int64_t row, int lane) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int at = first_value(p, lane);
      if (at < Form::kNope) {
        parts[p].load_codes(call.nope + row * Form::kNope + at);
        if (sizeof(Scale) == 1 || p == 0) scales[sizeof(Scale) == 1 ? p : 0] = load_scale<Form, Scale>(call, row, at);
      } else {
        parts[p].load_rope(call.rope + row * Form::kRope + (at - Form::kNope));
      }
    }
  }
  __device__ __forceinline__ void store(const ReadRecords& call, int64_t vector, int lane, bool exists) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int at = first_value(p, lane);
      uint4 words = make_uint4(0, 0, 0, 0);
      if (exists) {
        words = at < Form::kNope ? parts[p].decode_codes(scale_value(scales[sizeof(Scale) == 1 ? p : 0]))
                                 : parts[p].decode_rope();
      }
      *reinterpret_cast<uint4*>(static_cast<Out*>(call.out) + vector * Form::kDim + at) = words;
    }
  }
};

// An FP4 key in a warp, four values a lane.
template <typename Form, int kGroup>
struct KeyInWarp {
  static_assert(Form::kDim == 32 * 4, "four values a lane");
  uint16_t codes;
  uint8_t scale;

  __device__ __forceinline__ void load(const ReadKeys& call, int64_t row, int lane) {
    codes = __ldg(reinterpret_cast<const uint16_t*>(call.keys + row * (Form::kDim / 2)) + lane);
    scale = __ldg(call.scale + row * (Form::kDim / kGroup) + lane * 4 / kGroup);
  }
  __device__ __forceinline__ void store(const ReadKeys& call, int64_t vector, int lane, bool exists) const {
    float x[4] = {};
    const float value = kGroup == 16 ? e4m3_value(scale) : e8m0_value(scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = exists ? e2m1_value(static_cast<uint32_t>(codes) >> (4 * i)) * value : 0.0f;
    *reinterpret_cast<uint4*>(call.out + vector * Form::kDim + lane * 4) = words_of(x);
  }
};

}  // namespace dsv4

#endif  // DSV4_READ_READER_CUH_
