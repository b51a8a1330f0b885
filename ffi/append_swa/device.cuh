// append_swa on the device where the tokens are many: a warp a token, records of 448 + 64 values.
#ifndef DSV4_APPEND_SWA_DEVICE_CUH_
#define DSV4_APPEND_SWA_DEVICE_CUH_

#include <cuda_runtime.h>

#include "append_swa/op.h"
#include "cuda/quantise_warp.cuh"
#include "formats/float_math.h"

namespace dsv4 {

constexpr int kNopeWidth = 448, kRopeWidth = 64, kWidth = kNopeWidth + kRopeWidth;
constexpr int kScaleWidth = 8;     // E8M0 bytes of a row, where it has a scale for every 64 values
constexpr int kHalf = kWidth / 2;  // a lane holds 8 values of each half of a token
constexpr int kFirstRopeLane = (kNopeWidth - kHalf) / 8;  // in the second half, lanes from here on hold the RoPE part

// Eight values of a token as loaded, read once and not kept in the cache: 16 bytes of bfloat16 or 32 of float32.
template <typename T>
struct Eight;

template <>
struct Eight<BFloat16> {
  uint32_t words[4];

  __device__ __forceinline__ void load(const BFloat16* from) {
    const uint4 raw = __ldcs(reinterpret_cast<const uint4*>(from));
    words[0] = raw.x, words[1] = raw.y, words[2] = raw.z, words[3] = raw.w;
  }
  __device__ __forceinline__ void unpack(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = float_of(words[i] << 16);
      x[2 * i + 1] = float_of(words[i] & 0xFFFF0000u);
    }
  }
  __device__ __forceinline__ uint32_t max_magnitude() const {
    uint32_t amax = 0;  // of two values at a time: bfloat16 is the upper half of a float
#pragma unroll
    for (int i = 0; i < 4; ++i) amax = __vmaxu2(amax, words[i] & 0x7FFF7FFFu);
    return max(amax & 0xFFFF0000u, amax << 16);
  }
  __device__ __forceinline__ uint4 to_bf16x8() const {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t nan = __vcmpgtu2(words[i] & 0x7FFF7FFFu, 0x7F807F80u);
      out[i] = (words[i] & ~nan) | (0x7FC07FC0u & nan);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
};

template <>
struct Eight<float> {
  float values[8];

  __device__ __forceinline__ void load(const float* from) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 raw = __ldcs(reinterpret_cast<const float4*>(from) + i);
      values[4 * i] = raw.x, values[4 * i + 1] = raw.y, values[4 * i + 2] = raw.z, values[4 * i + 3] = raw.w;
    }
  }
  __device__ __forceinline__ void unpack(float (&x)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = values[i];
  }
  __device__ __forceinline__ uint32_t max_magnitude() const {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) amax = max(amax, magnitude_bits(values[i]));
    return amax;
  }
  __device__ __forceinline__ uint4 to_bf16x8() const {
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out[i] = to_bf16(values[2 * i]).bits | (static_cast<uint32_t>(to_bf16(values[2 * i + 1]).bits) << 16);
    }
    return make_uint4(out[0], out[1], out[2], out[3]);
  }
};

template <typename Encoder, typename T>
__device__ __forceinline__ uint2 encode_eight(const Encoder& encoder, const Eight<T>& eight) {
  float x[8];
  eight.unpack(x);
  return make_uint2(encoder.encode(x[0], x[1], x[2], x[3]), encoder.encode(x[4], x[5], x[6], x[7]));
}

// What one lane needs to normalise and rotate its values of a token.
struct LaneNormaliser {
  float first_weight[8], second_weight[8];
  float4 cos = {}, sin = {};

  __device__ __forceinline__ LaneNormaliser(const AppendSwa& call, int64_t token, int lane) {
    load_eight(call.norm + lane * 8, first_weight);
    load_eight(call.norm + kHalf + lane * 8, second_weight);
    if (lane < kFirstRopeLane) return;
    const int64_t pair = token * (kRopeWidth / 2) + (lane - kFirstRopeLane) * 4;
    cos = __ldg(reinterpret_cast<const float4*>(call.cos + pair));
    sin = __ldg(reinterpret_cast<const float4*>(call.sin + pair));
  }

  // Squares are added in neighbouring pairs, as on the CPU.
  __device__ __forceinline__ void operator()(float (&first)[8], float (&second)[8], float eps, int lane) const {
    float a = squares(first), b = squares(second);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      a += __shfl_xor_sync(0xFFFFFFFFu, a, step);
      b += __shfl_xor_sync(0xFFFFFFFFu, b, step);
    }
    const float scale = inverse_sqrt((a + b) * (1.0f / kWidth) + eps);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      first[i] = first[i] * scale * first_weight[i];
      second[i] = second[i] * scale * second_weight[i];
    }
    if (lane < kFirstRopeLane) return;
    const float cosines[4] = {cos.x, cos.y, cos.z, cos.w}, sines[4] = {sin.x, sin.y, sin.z, sin.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float even = second[2 * i], odd = second[2 * i + 1];
      second[2 * i] = even * cosines[i] - odd * sines[i];
      second[2 * i + 1] = even * sines[i] + odd * cosines[i];
    }
  }

 private:
  static __device__ __forceinline__ void load_eight(const float* from, float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(from) + i);
      x[4 * i] = v.x, x[4 * i + 1] = v.y, x[4 * i + 2] = v.z, x[4 * i + 3] = v.w;
    }
  }
  static __device__ __forceinline__ float squares(const float (&x)[8]) {
    return quad_of_squares(x[0], x[1], x[2], x[3]) + quad_of_squares(x[4], x[5], x[6], x[7]);
  }
};

// kGrouped: a power-of-two scale for every 64 values, which eight lanes hold; otherwise one scale for the row.
template <bool kGrouped, typename T>
__device__ __forceinline__ void write_row(const AppendSwa& call, int64_t row, int32_t role, int32_t slot, int32_t position,
                                          int lane, const Eight<T>& first, const Eight<T>& second) {
  const bool is_rope = lane >= kFirstRopeLane;
  const uint32_t first_amax = first.max_magnitude(), second_amax = is_rope ? 0u : second.max_magnitude();
  uint8_t* nope = call.record.nope + row * kNopeWidth + lane * 8;
  uint2 first_codes, second_codes;
  if constexpr (kGrouped) {
    const GroupEncoder<8> first_encoder(first_amax), second_encoder(second_amax);
    first_codes = encode_eight(first_encoder, first);
    second_codes = encode_eight(second_encoder, second);
    if (lane % 8 == 0) {
      uint8_t* scales = call.record.scales + row * kScaleWidth + lane / 8;
      scales[0] = first_encoder.scale();
      scales[kScaleWidth / 2] = is_rope ? 0 : second_encoder.scale();  // the last is padding
    }
  } else {
    const RowEncoder encoder(__reduce_max_sync(0xFFFFFFFFu, max(first_amax, second_amax)));
    first_codes = encode_eight(encoder, first);
    second_codes = encode_eight(encoder, second);
    if (lane == 0) call.record.inv_scale[row] = encoder.inv_scale();
  }
  *reinterpret_cast<uint2*>(nope) = first_codes;
  if (is_rope) {
    BFloat16* rope = call.record.rope + row * kRopeWidth + (lane - kFirstRopeLane) * 8;
    *reinterpret_cast<uint4*>(rope) = second.to_bf16x8();
  } else {
    *reinterpret_cast<uint2*>(nope + kHalf) = second_codes;
  }
  if (lane == 0) call.enter(role, slot, position, row);
}

// What one warp does: the token is loaded before it is known whether it is written; that saves a trip to memory.
template <typename T, bool kFused, bool kGrouped>
__device__ __forceinline__ void append_token(const AppendSwa& call, int64_t token, int lane) {
  if (token >= call.tokens) return;

  const T* kv = static_cast<const T*>(call.kv) + token * kWidth + lane * 8;
  Eight<T> first, second;
  first.load(kv);
  second.load(kv + kHalf);
  const int32_t role = call.role_of[token], slot = call.slot_of[token], position = call.position_of[token];
  if constexpr (kFused) {
    const LaneNormaliser normalise(call, token, lane);
    const int64_t row = call.row_of(role, slot, position);
    if (row < 0) return;
    Eight<float> first_values, second_values;
    first.unpack(first_values.values);
    second.unpack(second_values.values);
    normalise(first_values.values, second_values.values, call.eps, lane);
    write_row<kGrouped>(call, row, role, slot, position, lane, first_values, second_values);
  } else {
    const int64_t row = call.row_of(role, slot, position);
    if (row >= 0) write_row<kGrouped>(call, row, role, slot, position, lane, first, second);
  }
}

// What the kernels support of what the operands may be.
inline ffi::Error supported_window(const char* op, const AppendSwa& call) {
  const std::string got = std::string(op) + ": got ";
  if (call.nope_width != kNopeWidth || call.rope_width != kRopeWidth) {
    return ffi::Error::InvalidArgument(got + "records of " + std::to_string(call.nope_width) + " + " +
                                       std::to_string(call.rope_width) + " values; expected 448 + 64 on CUDA.");
  }
  if (call.record.scales && call.record.scale_width != kScaleWidth) {
    return ffi::Error::InvalidArgument(got + std::to_string(call.record.scale_width) + " scales a row; expected 8 on CUDA.");
  }
  return ffi::Error::Success();
}

}  // namespace dsv4

#endif  // DSV4_APPEND_SWA_DEVICE_CUH_
