// append_swa on the device where the tokens are many: a warp a token.
#ifndef DSV4_APPEND_SWA_DEVICE_CUH_
#define DSV4_APPEND_SWA_DEVICE_CUH_

#include <cuda_runtime.h>

#include "append_swa/op.h"
#include "cuda/record_writer.cuh"
#include "cuda/rms_norm_rope.cuh"

namespace dsv4 {

// A warp holds a token, a lane eight neighbouring channels at a time where that goes into the record.
template <typename Form>
using TokenInWarp = Spread<Form::kDim, 32,
                           Form::kDim % 256 == 0   ? 8
                           : Form::kDim % 128 == 0 ? 4
                                                   : 2>;

// Writes a row, and says so. kGrouped: a power-of-two scale for every group of values; otherwise one scale for the row.
template <typename Form, bool kGrouped, typename Piece, int kPieces>
__device__ __forceinline__ void write_row(const AppendSwa& call, const TokenPlace& place, int lane,
                                          const Piece (&pieces)[kPieces]) {
  constexpr Scales kScales = kGrouped ? Scales::kGroups : Scales::kWhole;
  RecordWriter<Form, TokenInWarp<Form>>::template write<kScales>(call.record, place.row, pieces, lane, nullptr);
  if (lane == 0) call.enter(place);
}

// What one warp does: the token is loaded before it is known whether it is written; that saves a trip to memory.
template <typename Form, typename T, bool kFused, bool kGrouped>
__device__ __forceinline__ void append_token(const AppendSwa& call, int64_t token, int lane) {
  using Layout = TokenInWarp<Form>;
  constexpr int kPieces = Layout::kPieces, kVector = Layout::kVector;
  if (token >= call.tokens) return;

  const T* kv = static_cast<const T*>(call.kv) + token * Form::kDim;
  Values<T, kVector> pieces[kPieces];
#pragma unroll
  for (int p = 0; p < kPieces; ++p) pieces[p].load(kv + Layout::channel(p, lane));
  TokenPlace place = call.look_up(token);
  if constexpr (kFused) {
    SpreadRmsNormRope<Layout, Form::kRope, Load::kShared> rms_norm_rope;
    const int64_t pair = token * (Form::kRope / 2);
    rms_norm_rope.load(call.norm, call.cos + pair, call.sin + pair, lane);
    place.row = call.row_of(place);
    if (place.row < 0) return;
    float x[kPieces][kVector];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) x[p][i] = pieces[p][i];
    }
    rms_norm_rope(x, call.eps, lane, nullptr);
    Values<float, kVector> normed[kPieces];
#pragma unroll
    for (int p = 0; p < kPieces; ++p) normed[p] = Values<float, kVector>::of(x[p]);
    write_row<Form, kGrouped>(call, place, lane, normed);
  } else {
    place.row = call.row_of(place);
    if (place.row >= 0) write_row<Form, kGrouped>(call, place, lane, pieces);
  }
}

template <typename Form>
inline ffi::Error supported_window(const char* op, const AppendSwa& call) {
  return supported_record<Form>(op, call.record);
}

}  // namespace dsv4

#endif  // DSV4_APPEND_SWA_DEVICE_CUH_
