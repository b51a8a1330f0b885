// Finishing an entry of compress whose channels are spread over threads: RMSNorm and RoPE, and the stored form.
#ifndef DSV4_COMPRESS_FINISH_CUH_
#define DSV4_COMPRESS_FINISH_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/op.h"
#include "cuda/geometry.cuh"
#include "cuda/key_writer.cuh"
#include "cuda/ptx.cuh"
#include "cuda/record_writer.cuh"
#include "cuda/rms_norm_rope.cuh"

namespace dsv4 {

// The rotation of the w-th of all segments' windows.
template <typename Form, typename RmsNormRope>
__device__ __forceinline__ void load_constants(const Compress& call, int64_t window, int thread,
                                               RmsNormRope* constants) {
  const int64_t pair = window * (Form::kRope / 2);
  constants->load(call.norm, call.cos + pair, call.sin + pair, thread);
}

// As an FP8 record; the threads of the layout, each with one piece of it, call together.
template <typename RecordForm, typename Spread, Load kLoad>
struct FinishRecord {
  using Form = RecordForm;
  using Layout = Spread;
  using Constants = SpreadRmsNormRope<Layout, Form::kRope, kLoad>;
  using Writer = RecordWriter<Form, Layout>;
  static constexpr int kThreads = Layout::kThreads, kVector = Layout::kVector;

  // Free again when the next barrier after a call is passed.
  struct Scratch {
    typename Constants::Scratch squares;
    typename Writer::Scratch amax;
  };

  RecordRows record;

  static __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread, Constants* constants) {
    load_constants<Form>(call, window, thread, constants);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             const float (&pooled)[kVector], Scratch* scratch) const {
    float v[1][kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[0][i] = pooled[i];
    constants(v, call.eps, thread, scratch->squares);
    const Values<float, kVector> piece[1] = {Values<float, kVector>::of(v[0])};
    Writer::write(record, row, piece, thread, scratch->amax);
  }
};

// As an FP4 key, four channels in each lane of a warp.
template <typename KeyForm>
struct FinishKey {
  using Form = KeyForm;
  using Layout = Spread<Form::kDim, 32, 4>;
  using Constants = SpreadRmsNormRope<Layout, Form::kRope, Load::kShared>;
  static constexpr int kThreads = Layout::kThreads, kVector = Layout::kVector;
  struct Scratch {};

  KeyRows keys;

  static __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread, Constants* constants) {
    load_constants<Form>(call, window, thread, constants);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             const float (&pooled)[kVector], Scratch*) const {
    float v[1][kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[0][i] = pooled[i];
    constants(v, call.eps, thread, nullptr);
    KeyWriter<Form>::write(keys, row, v[0], thread);
  }
};

// The same of two channels in each of kDim / 2 threads, one of the groups of a block: the first warp of them finishes.
template <typename KeyForm>
struct FinishKeyOfPairs {
  using Form = KeyForm;
  using Warp = FinishKey<Form>;
  using Constants = typename Warp::Constants;
  static constexpr int kThreads = Form::kDim / 2;
  struct Scratch {
    float4 values[32];
  };

  Warp warp;

  static __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread, Constants* constants) {
    if (thread < 32) Warp::load(call, window, thread, constants);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             const float (&pooled)[2], Scratch* scratch) const {
    store_pair(reinterpret_cast<float*>(scratch->values) + thread * 2, pooled);
    ptx::sync_threads(threadIdx.x / kThreads + 1, kThreads);
    if (thread >= 32) return;
    const float4 x = scratch->values[thread];
    const float v[4] = {x.x, x.y, x.z, x.w};
    warp(call, constants, row, thread, v, nullptr);
  }
};

// An entry in the registers of a block of kDim / 2 threads, a pair of channels in each.
template <typename Form>
using FinishRecordInBlock = FinishRecord<Form, Spread<Form::kDim, Form::kDim / 2, 2>, Load::kAhead>;

// An entry in kDim / 4 threads of a block, four channels in each.
template <typename Form>
using FinishRecordInQuads = FinishRecord<Form, Spread<Form::kDim, Form::kDim / 4, 4, 1>, Load::kShared>;

}  // namespace dsv4

#endif  // DSV4_COMPRESS_FINISH_CUH_
