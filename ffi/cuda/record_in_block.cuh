// A record of 448 + 64 channels that lies in the registers of a block of 256 threads, a pair of neighbouring channels in
// each: RMSNorm and RoPE in the order of operations of rms_norm_rope.h, and the FP8 record.
#ifndef DSV4_RECORD_IN_BLOCK_CUH_
#define DSV4_RECORD_IN_BLOCK_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/quantise_warp.cuh"
#include "formats/float_math.h"
#include "formats/record_rows.h"

namespace dsv4 {

constexpr int kRecordDim = 512, kRecordRopeDim = 64, kRecordNopeDim = kRecordDim - kRecordRopeDim;

// One or two neighbouring values as loaded, by a load that stays ahead of the branch which may make it useless: the compiler would
// move it behind, and two trips to memory would follow each other.
template <typename T, int kWidth>
struct Ahead {
  static constexpr int kBytes = sizeof(T) * kWidth;
  uint32_t words[(kBytes + 3) / 4];

  __device__ __forceinline__ void load(const T* from) {
    if constexpr (kBytes == 2) {
      uint16_t half;
      asm volatile("ld.global.cs.u16 %0, [%1];" : "=h"(half) : "l"(from));
      words[0] = half;
    } else if constexpr (kBytes == 4) {
      asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(words[0]) : "l"(from));
    } else {
      static_assert(kBytes == 8, "what a load can bring");
      asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(from));
    }
  }
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return float_of(words[i]);
    return float_of(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
  }
};

__device__ __forceinline__ void store_pair(float* to, const float (&x)[2]) {
  *reinterpret_cast<float2*>(to) = make_float2(x[0], x[1]);
}

// All threads of the block call together.
struct RecordInBlock {
  static constexpr int kThreads = kRecordDim / 2, kWarps = kThreads / 32;
  static constexpr int kRopeThread = kRecordNopeDim / 2;  // the first with channels to rotate; whole warps have them

  // Memory that the threads share; free again when the next barrier after a call is passed.
  struct Scratch {
    float squares[kWarps];
    uint32_t amax[kWarps];
  };

  // What normalising needs besides the values. cosines and sines: of the record's position, one for every rotated pair.
  struct Constants {
    Ahead<float, 2> weight;
    Ahead<float, 1> cos, sin;

    __device__ __forceinline__ void load(const float* norm, const float* cosines, const float* sines, int thread) {
      weight.load(norm + thread * 2);
      if (thread < kRopeThread) return;
      cos.load(cosines + thread - kRopeThread);
      sin.load(sines + thread - kRopeThread);
    }
  };

  // RMSNorm and RoPE.
  static __device__ __forceinline__ void normalise(float (&v)[2], const Constants& constants, float eps, int thread,
                                                   Scratch* scratch) {
    float squares = v[0] * v[0] + v[1] * v[1];
#pragma unroll
    for (int step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
    if (thread % 32 == 0) scratch->squares[thread / 32] = squares;
    __syncthreads();
    const float* x = scratch->squares;
    static_assert(kWarps == 8, "the tree over warps");
    squares = ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
    const float scale = inverse_sqrt(squares * (1.0f / kRecordDim) + eps);
    const float even = v[0] * scale * constants.weight[0], odd = v[1] * scale * constants.weight[1];
    v[0] = even, v[1] = odd;
    if (thread < kRopeThread) return;
    v[0] = even * constants.cos[0] - odd * constants.sin[0];
    v[1] = even * constants.sin[0] + odd * constants.cos[0];
  }

  // Quantises and stores.
  static __device__ __forceinline__ void write(const RecordRows& record, int64_t row, const float (&v)[2], int thread,
                                               Scratch* scratch) {
    const bool is_rope = thread >= kRopeThread;
    uint32_t amax = 0, codes;
    if (is_rope) {
      const uint32_t words = to_bf16(v[0]).bits | (static_cast<uint32_t>(to_bf16(v[1]).bits) << 16);
      reinterpret_cast<uint32_t*>(record.rope + row * kRecordRopeDim)[thread - kRopeThread] = words;
    } else {
      amax = max(magnitude_bits(v[0]), magnitude_bits(v[1]));
    }
    if (record.scales) {  // a warp has a group of 64 channels, the last warp the RoPE part
      const GroupEncoder<32> encoder(amax);
      codes = encoder.encode(v[0], v[1]);
      if (thread % 32 == 0) record.scales[row * kWarps + thread / 32] = is_rope ? 0 : encoder.scale();
    } else {
      amax = __reduce_max_sync(0xFFFFFFFFu, amax);
      if (thread % 32 == 0) scratch->amax[thread / 32] = amax;
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) amax = max(amax, scratch->amax[i]);
      const RowEncoder encoder(amax);
      codes = encoder.encode(v[0], v[1]);
      if (thread == 0) record.inv_scale[row] = encoder.inv_scale();
    }
    if (is_rope) return;
    reinterpret_cast<uint16_t*>(record.nope + row * kRecordNopeDim)[thread] = static_cast<uint16_t>(codes);
  }
};

}  // namespace dsv4

#endif  // DSV4_RECORD_IN_BLOCK_CUH_
