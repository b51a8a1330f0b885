// append_swa: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/write/append_swa.py.
#ifndef DSV4_APPEND_SWA_OP_H_
#define DSV4_APPEND_SWA_OP_H_

#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/float_bits.h"
#include "formats/record_rows.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {

// What a token writes, as resolve_writes decides it; 0 is nothing.
constexpr int32_t kWritesRow = 1;
constexpr int32_t kWritesRowAndHead = 2;

// One layer's rings, R slots of W rows, and the T tokens of a call.
struct AppendSwa {
  int64_t tokens, slots, rows, nope_width, rope_width;
  RecordRows record;  // (R, W) rows
  int32_t* pos;       // (R, W)
  int32_t* head;      // (R)
  const void* kv;     // (T, nope_width + rope_width), float or BFloat16
  bool kv_is_float;
  const int32_t* slot_of;
  const int32_t* position_of;
  const int32_t* role_of;
  // The fused form, in which kv is normalised and rotated on the way; null in the plain form.
  const float* norm;  // (nope_width + rope_width)
  const float* cos;   // (T, rope_width / 2)
  const float* sin;
  float eps;

  // The row, counted over all slots, that a token with a role writes; -1 if it writes none.
  DSV4_HOST_DEVICE int64_t row_of(int32_t role, int32_t slot, int32_t position) const {
    if (role < kWritesRow || slot < 0 || slot >= slots || position < 0) return -1;
    return static_cast<int64_t>(slot) * rows + modulo_rows(static_cast<uint32_t>(position));
  }
  // Says what a row holds, and where the slot's next token goes.
  DSV4_HOST_DEVICE void enter(int32_t role, int32_t slot, int32_t position, int64_t row) const {
    pos[row] = position;
    if (role == kWritesRowAndHead) head[slot] = next_row(position);
  }
  DSV4_HOST_DEVICE int32_t next_row(int32_t position) const {
    return static_cast<int32_t>(modulo_rows(static_cast<uint32_t>(position) + 1u));
  }
  DSV4_HOST_DEVICE uint32_t modulo_rows(uint32_t position) const {
    const uint32_t n = static_cast<uint32_t>(rows);
    return (n & (n - 1)) ? position % n : position & (n - 1);  // the usual 128 needs no division
  }
};

// Takes a call's operands (ring, kv, slots, positions, roles; norm, cos, sin in the fused form) and points `call` at the
// layer to write.
inline void take_append_swa(Operands& operands, int64_t layer, bool fused, float eps, AppendSwa* call) {
  using ffi::DataType;
  const Operands::Shape ring = operands.shape_of_next();
  const bool stacked = ring.size() == 4;
  if (ring.size() != 3 && !stacked) {
    return operands.fail("nope " + Operands::text(ring), "([layers,] slots, rows, width)");
  }
  if (stacked ? !LayerOf::exists(layer, ring[0]) : layer != -1) {
    operands.fail("layer " + std::to_string(layer) + " for nope " + Operands::text(ring),
                  "one of its layers, or -1 if it has none");
  }
  const int64_t num_slots = ring[ring.size() - 3], rows = ring[ring.size() - 2], nope_width = ring[ring.size() - 1];
  if (rows < 1 || rows > INT32_MAX || num_slots > INT32_MAX) {
    operands.fail("nope " + Operands::text(ring), "1 to 2^31 - 1 rows and at most 2^31 - 1 slots");
  }
  const Operands::Shape rope_shape = operands.shape_of_next(1), kv_shape = operands.shape_of_next(5);
  const int64_t rope_width = rope_shape.empty() ? -1 : rope_shape.back();
  const int64_t tokens = kv_shape.empty() ? -1 : kv_shape.front();
  const auto with_layers = [&](Operands::Shape shape) {
    if (stacked) shape.insert(shape.begin(), ring[0]);
    return shape;
  };
  uint8_t* nope = operands.take<uint8_t>("nope", {DataType::U8}, ring);
  BFloat16* rope = operands.take<BFloat16>("rope", {DataType::BF16}, with_layers({num_slots, rows, rope_width}));
  const Operands::Shape scale_shape = operands.shape_of_next();
  const bool grouped = scale_shape.size() == ring.size();
  const int64_t scale_width = grouped ? scale_shape.back() : 0;
  if (grouped && (nope_width % 64 || 64 * scale_width < nope_width)) {
    operands.fail("inv_scale " + Operands::text(scale_shape), "one for every 64 of " + std::to_string(nope_width) + " values");
  }
  float* inv_scale = nullptr;
  uint8_t* scales = nullptr;
  if (grouped) {
    scales = operands.take<uint8_t>("inv_scale", {DataType::U8}, with_layers({num_slots, rows, scale_width}));
  } else {
    inv_scale = operands.take<float>("inv_scale", {DataType::F32}, with_layers({num_slots, rows}));
  }
  int32_t* pos = operands.take<int32_t>("pos", {DataType::S32}, with_layers({num_slots, rows}));
  int32_t* head = operands.take<int32_t>("head", {DataType::S32}, with_layers({num_slots}));
  operands.updated();
  const void* kv = operands.take("kv", {DataType::F32, DataType::BF16}, {tokens, nope_width + rope_width});
  const bool kv_is_float = operands.dtype() == DataType::F32;
  const int32_t* slots = operands.take<int32_t>("slots", {DataType::S32}, {tokens});
  const int32_t* positions = operands.take<int32_t>("positions", {DataType::S32}, {tokens});
  const int32_t* roles = operands.take<int32_t>("roles", {DataType::S32}, {tokens});
  const float *norm = nullptr, *cos = nullptr, *sin = nullptr;
  if (fused) {
    norm = operands.take<float>("norm", {DataType::F32}, {nope_width + rope_width});
    cos = operands.take<float>("cos", {DataType::F32}, {tokens, rope_width / 2});
    sin = operands.take<float>("sin", {DataType::F32}, {tokens, rope_width / 2});
    if (rope_width % 2) operands.fail("a RoPE part of " + std::to_string(rope_width), "pairs of values");
  }
  if (!operands.ok()) return;

  const LayerOf slots_of(stacked ? layer : 0, ring[0], num_slots);
  const int64_t first_slot = slots_of.index * num_slots;
  const int64_t first_row = first_slot * rows;
  const RecordRows record = {nope + first_row * nope_width, rope + first_row * rope_width,
                             grouped ? nullptr : inv_scale + first_row,
                             grouped ? scales + first_row * scale_width : nullptr, scale_width};
  *call = {tokens, slots_of.length, rows, nope_width, rope_width, record, pos + first_row, head + first_slot,
           kv, kv_is_float, slots, positions, roles, norm, cos, sin, eps};
}

inline ffi::Error bind_append_swa(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, bool fused,
                                  float eps, AppendSwa* call) {
  Operands operands("append_swa", args);
  take_append_swa(operands, layer, fused, eps, call);
  return operands.ok() ? operands.expect_in_place(results) : operands.error();
}

}  // namespace dsv4

#endif  // DSV4_APPEND_SWA_OP_H_
