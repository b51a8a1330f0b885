// Neighbouring values of a row in a thread's registers, as loaded.
#ifndef DSV4_CUDA_VALUES_CUH_
#define DSV4_CUDA_VALUES_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "formats/quantise.h"

namespace dsv4 {

enum class Load {
  kOnce,   // read once and not kept in the cache
  kAhead,  // the same, and before any branch that may make it useless: the compiler would move it behind, and two trips
           // to memory would follow each other
  kShared,  // read by other threads too
  kPlain,   // of memory that may be written
};

// kWidth values of float or BFloat16.
template <typename T, int kWidth, Load kLoad = Load::kOnce>
struct Values {
  static constexpr int kBytes = sizeof(T) * kWidth, kWords = (kBytes + 3) / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kLoad == Load::kAhead) {
      ptx::load_ahead<kBytes>(from, words);
    } else if constexpr (kBytes == 4) {
      words[0] = load_as<uint32_t>(from);
    } else if constexpr (kBytes == 8) {
      const uint2 raw = load_as<uint2>(from);
      words[0] = raw.x, words[1] = raw.y;
    } else {
      static_assert(kBytes % 16 == 0, "what a load can bring");
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        const uint4 raw = load_as<uint4>(reinterpret_cast<const uint4*>(from) + i);
        words[4 * i] = raw.x, words[4 * i + 1] = raw.y, words[4 * i + 2] = raw.z, words[4 * i + 3] = raw.w;
      }
    }
  }

  static __device__ __forceinline__ Values of(const float (&x)[kWidth]) {
    static_assert(sizeof(T) == 4, "floats");
    Values values;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values.words[i] = bits_of(x[i]);
    return values;
  }

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return float_of(words[i]);
    return float_of(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
  }

  __device__ __forceinline__ uint32_t max_magnitude() const {
    uint32_t amax = 0;
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) amax = max(amax, words[i] & 0x7FFFFFFFu);
      return amax;
    } else {  // of two values at a time: bfloat16 is the upper half of a float
#pragma unroll
      for (int i = 0; i < kWords; ++i) amax = __vmaxu2(amax, words[i] & 0x7FFF7FFFu);
      return max(amax & 0xFFFF0000u, amax << 16);
    }
  }

  // As bfloat16, to nearest; every NaN becomes 0x7fc0.
  __device__ __forceinline__ void to_bf16_pairs(uint32_t (&pairs)[kWidth / 2]) const {
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      if constexpr (sizeof(T) == 4) {
        const float low = float_of(words[2 * i]), high = float_of(words[2 * i + 1]);
        pairs[i] = to_bf16(low).bits | (static_cast<uint32_t>(to_bf16(high).bits) << 16);
      } else {
        const uint32_t nan = __vcmpgtu2(words[i] & 0x7FFF7FFFu, 0x7F807F80u);
        pairs[i] = (words[i] & ~nan) | (0x7FC07FC0u & nan);
      }
    }
  }

 private:
  template <typename Words>
  static __device__ __forceinline__ Words load_as(const void* from) {
    const auto* typed = static_cast<const Words*>(from);
    if constexpr (kLoad == Load::kPlain) return *typed;
    return kLoad == Load::kShared ? __ldg(typed) : __ldcs(typed);
  }
};

// Stores the first kBytes of the words at once.
template <int kBytes>
__device__ __forceinline__ void store_words(void* to, const uint32_t* words) {
  if constexpr (kBytes == 2) {
    *static_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
  } else if constexpr (kBytes == 4) {
    *static_cast<uint32_t*>(to) = words[0];
  } else if constexpr (kBytes == 8) {
    *static_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  } else {
    static_assert(kBytes == 16, "what a store can take");
    *static_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

__device__ __forceinline__ void store_pair(float* to, const float (&x)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}

}  // namespace dsv4

#endif  // DSV4_CUDA_VALUES_CUH_
