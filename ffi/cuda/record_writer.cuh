// Writing an FP8 record whose values are spread over threads.
#ifndef DSV4_CUDA_RECORD_WRITER_CUH_
#define DSV4_CUDA_RECORD_WRITER_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/geometry.cuh"
#include "cuda/quantise_warp.cuh"
#include "cuda/rms_norm_rope.cuh"
#include "cuda/values.cuh"
#include "formats/record_rows.h"

namespace dsv4 {

// What a record's scales are: a power of two for every group of values, or one float; or what the arrays say.
enum class Scales { kGroups, kWhole, kEither };

template <typename Form, typename Layout>
class RecordWriter {
  static constexpr int kVector = Layout::kVector, kPieces = Layout::kPieces, kWarps = Layout::kWarps;
  static constexpr int kGroupThreads = Form::kGroup / kVector;  // neighbours that hold a group
  static_assert(Layout::kDim == Form::kDim && Form::kNope % kVector == 0, "a piece is of one part of the record");

 public:
  // Memory that the threads share; free again when the next barrier after a call is passed.
  using Scratch = uint32_t[kWarps];

  // All threads of the layout call together; with one warp the scratch is not used.
  template <Scales kScales = Scales::kEither, typename Piece>
  static __device__ __forceinline__ void write(const RecordRows& record, int64_t row, const Piece (&v)[kPieces],
                                               int thread, uint32_t* scratch) {
    uint32_t codes[kPieces][kWords];
    if (kScales == Scales::kGroups || (kScales == Scales::kEither && record.scales)) {
      quantise_groups(record.scales + row * Form::kScales, v, thread, codes);
    } else {
      quantise_whole(record.inv_scale + row, v, thread, scratch, codes);
    }
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const int channel = Layout::channel(p, thread);
      if (is_nope(p, thread)) {
        store_words<kVector>(record.nope + row * Form::kNope + channel, codes[p]);
      } else {
        uint32_t pairs[kVector / 2];
        v[p].to_bf16_pairs(pairs);
        store_words<2 * kVector>(record.rope + row * Form::kRope + (channel - Form::kNope), pairs);
      }
    }
  }

 private:
  static constexpr int kWords = (kVector + 3) / 4;  // of a piece's codes

  static __device__ __forceinline__ bool is_nope(int piece, int thread) {
    return Layout::channel(piece, Layout::kThreads) <= Form::kNope || Layout::channel(piece, thread) < Form::kNope;
  }

  template <typename Piece>
  static __device__ __forceinline__ uint32_t nope_magnitude(const Piece (&v)[kPieces], int piece, int thread) {
    return is_nope(piece, thread) ? v[piece].max_magnitude() : 0u;
  }

  template <typename Piece>
  static __device__ __forceinline__ void quantise_groups(uint8_t* scales, const Piece (&v)[kPieces], int thread,
                                                         uint32_t (&codes)[kPieces][kWords]) {
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      const GroupEncoder<kGroupThreads> encoder(nope_magnitude(v, p, thread));
      // Groups of the RoPE part are padding, as far as they lie among the scales.
      const int group = Layout::channel(p, thread) / Form::kGroup;
      if (thread % kGroupThreads == 0 && group < Form::kScales)
        scales[group] = is_nope(p, thread) ? encoder.scale() : 0;
      encode(encoder, v[p], codes[p]);
    }
    constexpr int kGroups = Form::kDim / Form::kGroup;
    if constexpr (kGroups < Form::kScales) {
      if (thread < Form::kScales - kGroups) scales[kGroups + thread] = 0;
    }
  }

  template <typename Piece>
  static __device__ __forceinline__ void quantise_whole(float* inv_scale, const Piece (&v)[kPieces], int thread,
                                                        uint32_t* scratch, uint32_t (&codes)[kPieces][kWords]) {
    uint32_t amax = 0;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) amax = max(amax, nope_magnitude(v, p, thread));
    amax = __reduce_max_sync(0xFFFFFFFFu, amax);
    if constexpr (kWarps > 1) {
      if (thread % 32 == 0) scratch[thread / 32] = amax;
      sync_threads_of<Layout>();
#pragma unroll
      for (int i = 0; i < kWarps; ++i) amax = max(amax, scratch[i]);
    }
    const RowEncoder encoder(amax);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) encode(encoder, v[p], codes[p]);
    if (thread == 0) *inv_scale = encoder.inv_scale();
  }

  template <typename Encoder, typename Piece>
  static __device__ __forceinline__ void encode(const Encoder& encoder, const Piece& v, uint32_t (&codes)[kWords]) {
    if constexpr (kVector == 2) {
      codes[0] = encoder.encode(v[0], v[1]);
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) codes[i] = encoder.encode(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
  }
};

}  // namespace dsv4

#endif  // DSV4_CUDA_RECORD_WRITER_CUH_
