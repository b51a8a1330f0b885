// append_swa: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/write/append_swa.py.
#ifndef DSV4_APPEND_SWA_OP_H_
#define DSV4_APPEND_SWA_OP_H_

#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/float_bits.h"
#include "formats/stored_operands.h"
#include "xla/ffi/api/ffi.h"

namespace dsv4 {

// What a token writes, as resolve_writes decides it; 0 is nothing.
constexpr int32_t kWritesRow = 1;
constexpr int32_t kWritesRowAndHead = 2;

// Where a token goes. row: counted over all slots, -1 for none.
struct TokenPlace {
  int32_t role, slot, position;
  int64_t row;
};

// One layer's rings, R slots of W rows, and the T tokens of a call.
struct AppendSwa {
  int64_t tokens, slots, rows;
  RecordRows record;  // (R, W) rows
  int32_t* pos;       // (R, W)
  int32_t* head;      // (R)
  const void* kv;     // (T, record.width()), float or BFloat16
  bool kv_is_float;
  const int32_t* slot_of;
  const int32_t* position_of;
  const int32_t* role_of;
  // The fused form, in which kv is normalised and rotated on the way; null in the plain form.
  const float* norm;  // (record.width())
  const float* cos;   // (T, record.rope_width / 2)
  const float* sin;
  float eps;

  DSV4_HOST_DEVICE TokenPlace look_up(int64_t token) const {
    return {role_of[token], slot_of[token], position_of[token], -1};
  }
  // The row that a token with a role writes; -1 if it writes none.
  DSV4_HOST_DEVICE int64_t row_of(const TokenPlace& place) const {
    if (place.role < kWritesRow || place.slot < 0 || place.slot >= slots || place.position < 0) return -1;
    return static_cast<int64_t>(place.slot) * rows + modulo_rows(static_cast<uint32_t>(place.position));
  }
  // Says what a row holds, and where the slot's next token goes.
  DSV4_HOST_DEVICE void enter(const TokenPlace& place) const {
    pos[place.row] = place.position;
    if (place.role == kWritesRowAndHead) head[place.slot] = next_row(place.position);
  }
  DSV4_HOST_DEVICE int32_t next_row(int32_t position) const {
    return static_cast<int32_t>(modulo_rows(static_cast<uint32_t>(position) + 1u));
  }
  DSV4_HOST_DEVICE uint32_t modulo_rows(uint32_t position) const {
    const uint32_t n = static_cast<uint32_t>(rows);
    return (n & (n - 1)) ? position % n : position & (n - 1);  // the usual 128 needs no division
  }
};

// Takes a call's operands (ring, kv, slots, positions, roles; norm, cos, sin in the fused form) and points `call` at
// the layer to write.
inline void take_append_swa(Operands& operands, int64_t layer, bool fused, float eps, AppendSwa* call) {
  using ffi::DataType;
  *call = {};
  const bool stacked = operands.shape_of_next().size() == 4;
  const StoredAs at = take_record_rows(operands, layer, &call->record, true);
  if (!operands.ok()) return;
  if (at.stride > INT32_MAX) operands.fail(std::to_string(at.stride) + " slots", "at most 2^31 - 1");
  const RecordRows& record = call->record;
  call->slots = at.count, call->rows = at.length, call->eps = eps;
  call->pos = operands.take<int32_t>("pos", {DataType::S32}, with_widths(at, stacked, {}));
  Operands::Shape heads = with_widths(at, stacked, {});
  heads.pop_back();
  call->head = operands.take<int32_t>("head", {DataType::S32}, heads);
  operands.updated();
  const Operands::Shape kv = operands.shape_of_next();
  const int64_t tokens = kv.empty() ? -1 : kv.front(), pairs = record.rope_width / 2;
  call->tokens = tokens;
  call->kv = operands.take("kv", {DataType::F32, DataType::BF16}, {tokens, record.width()});
  call->kv_is_float = operands.dtype() == DataType::F32;
  call->slot_of = operands.take<int32_t>("slots", {DataType::S32}, {tokens});
  call->position_of = operands.take<int32_t>("positions", {DataType::S32}, {tokens});
  call->role_of = operands.take<int32_t>("roles", {DataType::S32}, {tokens});
  if (fused) {
    call->norm = operands.take<float>("norm", {DataType::F32}, {record.width()});
    call->cos = operands.take<float>("cos", {DataType::F32}, {tokens, pairs});
    call->sin = operands.take<float>("sin", {DataType::F32}, {tokens, pairs});
    if (record.rope_width % 2) operands.fail("a RoPE part of " + std::to_string(record.rope_width), "pairs of values");
  }
  if (!operands.ok()) return;
  call->pos += at.first_row(), call->head += at.layer * at.stride;
}

inline ffi::Error bind_append_swa(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, bool fused,
                                  float eps, AppendSwa* call) {
  Operands operands("append_swa", args);
  take_append_swa(operands, layer, fused, eps, call);
  return operands.ok() ? operands.expect_in_place(results) : operands.error();
}

}  // namespace dsv4

#endif  // DSV4_APPEND_SWA_OP_H_
