// attend: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/read/attend.py.
#ifndef DSV4_ATTEND_OP_H_
#define DSV4_ATTEND_OP_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/float_bits.h"
#include "read/op.h"

namespace dsv4 {

struct AttendAttributes {
  int64_t layer, window, ratio;
  float scale, eps;
  int64_t max_entries, has_entries, has_selected, has_fresh, raw;
};

}  // namespace dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    dsv4::AttendAttributes, xla::ffi::StructMember<int64_t>("layer"), xla::ffi::StructMember<int64_t>("window"),
    xla::ffi::StructMember<int64_t>("ratio"), xla::ffi::StructMember<float>("scale"),
    xla::ffi::StructMember<float>("eps"), xla::ffi::StructMember<int64_t>("max_entries"),
    xla::ffi::StructMember<int64_t>("has_entries"), xla::ffi::StructMember<int64_t>("has_selected"),
    xla::ffi::StructMember<int64_t>("has_fresh"), xla::ffi::StructMember<int64_t>("raw"));

namespace dsv4 {

struct AttendCall {
  int64_t tokens, heads, width;      // T, H, d
  const void* q;                     // (T, H, d) float or BFloat16
  void* out;                         // as q
  bool is_float;                     // of q and out
  const float* sink;                 // (H)
  const int32_t *slots, *positions;  // (T)

  ReadRecords ring;  // of the layer, (R, W, ...)
  int64_t num_slots, ring_rows, window;

  bool has_entries;
  ReadRecords pool;  // of the layer, (N, E, ...)
  int64_t num_blocks, per_block, columns, ratio, max_entries;
  const int32_t* table;     // (R, columns)
  const int32_t* selected;  // (T, chosen), or null
  int64_t chosen;

  bool has_fresh;
  ReadRecords fresh;  // (T, ...)
  int64_t num_segments, per_segment;
  const int32_t *segment_slots, *starts, *counts;  // (S)
  const int32_t* segment_tokens;                   // (S, C)
  const int32_t* segment_rows;                     // (T)

  const float *cos, *sin;  // (T, pairs), or null
  int64_t pairs;
  float scale, eps;

  float* partials;  // (T, groups of heads, parts, floats), scratch for what thread blocks leave to be added up; or null
  int64_t parts;

  DSV4_HOST_DEVICE bool is_slot(int32_t slot) const { return slot >= 0 && slot < num_slots; }

  // Entries that a token at position p sees.
  DSV4_HOST_DEVICE int64_t visible(int64_t p) const {
    const int64_t closed = (p + 1) / ratio;
    return closed < max_entries ? closed : max_entries;
  }

  // The pool's row of entry e of a slot, counted over all blocks; -1: none.
  DSV4_HOST_DEVICE int64_t entry_row(int64_t slot, int64_t e) const {
    const int64_t column = e / per_block;
    if (column >= columns) return -1;
    const int64_t block = table[slot * columns + column];
    return block < 0 || block >= num_blocks ? -1 : block * per_block + (e - column * per_block);
  }
};

// Operands: q, sink, slots, positions; the ring's records; with has_entries the pool's and table; with has_selected
// selected; with has_fresh the records of the step's tokens and its segments; with raw cos and sin. A second result is
// scratch: its third size says in how many parts the rows of a token are taken.
inline ffi::Error bind_attend(ffi::RemainingArgs args, ffi::RemainingRets results, const AttendAttributes& attributes,
                              AttendCall* call) {
  const auto [layer, window, ratio, scale, eps, max_entries, has_entries, has_selected, has_fresh, raw] = attributes;
  Operands operands("attend", args);
  const Operands::Shape q = operands.shape_of_next();
  if (q.size() != 3) return operands.fail("q of another rank", "3 axes"), operands.error();
  *call = AttendCall{};
  call->tokens = q[0], call->heads = q[1], call->width = q[2];
  call->window = window, call->ratio = ratio, call->scale = scale, call->eps = eps, call->max_entries = max_entries;
  call->q = operands.take("q", {ffi::DataType::F32, ffi::DataType::BF16}, q);
  const bool is_float = operands.dtype() == ffi::DataType::F32;
  call->sink = operands.take<float>("sink", {ffi::DataType::F32}, {call->heads});
  call->slots = operands.take<int32_t>("slots", {ffi::DataType::S32}, {call->tokens});
  call->positions = operands.take<int32_t>("positions", {ffi::DataType::S32}, {call->tokens});
  if (!operands.ok()) return operands.error();

  const Operands::Shape ring = take_records(operands, layer, &call->ring);
  if (!operands.ok()) return operands.error();
  call->num_slots = ring[1], call->ring_rows = ring[2];
  const int64_t nope = call->ring.nope_width, rope = call->ring.rope_width;
  if (nope + rope != call->width) {
    operands.fail("records of " + std::to_string(nope + rope) + " values", std::to_string(call->width) + ", as q");
  }
  if (window < 1 || window > ring[2]) {
    operands.fail("window " + std::to_string(window), "1 to " + std::to_string(ring[2]));
  }

  call->has_entries = has_entries;
  if (operands.ok() && has_entries) {
    const Operands::Shape pool = take_records(operands, layer, &call->pool);
    const Operands::Shape table = operands.shape_of_next();
    if (operands.ok() && table.size() != 2) operands.fail("table of another rank", "2 axes");
    if (operands.ok() && ratio < 1) operands.fail("ratio " + std::to_string(ratio), "at least 1");
    if (operands.ok() && (call->pool.nope_width != nope || call->pool.rope_width != rope ||
                          call->pool.scale_width != call->ring.scale_width)) {
      operands.fail("entries of another form", "that of the ring");
    }
    if (!operands.ok()) return operands.error();
    call->num_blocks = pool[1], call->per_block = pool[2], call->columns = table[1];
    call->max_entries = std::min(max_entries, call->columns * call->per_block);
    call->table = operands.take<int32_t>("table", {ffi::DataType::S32}, {call->num_slots, table[1]});
  }
  if (operands.ok() && has_selected) {
    const Operands::Shape selected = operands.shape_of_next();
    call->chosen = selected.size() == 2 ? selected[1] : -1;
    call->selected = operands.take<int32_t>("selected", {ffi::DataType::S32}, {call->tokens, call->chosen});
  }
  call->has_fresh = has_fresh;
  if (operands.ok() && has_fresh) {
    ReadRecords& fresh = call->fresh;
    fresh = call->ring;
    fresh.nope = operands.take<uint8_t>("fresh.nope", {ffi::DataType::U8}, {call->tokens, nope});
    fresh.rope = operands.take<BFloat16>("fresh.rope", {ffi::DataType::BF16}, {call->tokens, rope});
    if (fresh.scale_width) {
      fresh.scale = operands.take("fresh.inv_scale", {ffi::DataType::U8}, {call->tokens, fresh.scale_width});
    } else {
      fresh.scale = operands.take("fresh.inv_scale", {ffi::DataType::F32}, {call->tokens});
    }
    const Operands::Shape tokens = operands.shape_of_next(3);
    if (operands.ok() && tokens.size() != 2) operands.fail("segments.tokens of another rank", "2 axes");
    if (!operands.ok()) return operands.error();
    call->num_segments = tokens[0], call->per_segment = tokens[1];
    call->segment_slots = operands.take<int32_t>("segments.slots", {ffi::DataType::S32}, {tokens[0]});
    call->starts = operands.take<int32_t>("segments.starts", {ffi::DataType::S32}, {tokens[0]});
    call->counts = operands.take<int32_t>("segments.counts", {ffi::DataType::S32}, {tokens[0]});
    call->segment_tokens = operands.take<int32_t>("segments.tokens", {ffi::DataType::S32}, tokens);
    call->segment_rows = operands.take<int32_t>("segments.rows", {ffi::DataType::S32}, {call->tokens});
  }
  if (operands.ok() && raw) {
    const Operands::Shape cos = operands.shape_of_next();
    call->pairs = cos.size() == 2 ? cos[1] : -1;
    call->cos = operands.take<float>("cos", {ffi::DataType::F32}, {call->tokens, call->pairs});
    call->sin = operands.take<float>("sin", {ffi::DataType::F32}, {call->tokens, call->pairs});
    if (2 * call->pairs > call->width) operands.fail("cos " + Operands::text(cos), "at most half of q");
  }
  call->out = take_result(results, q, operands, &call->is_float);
  if (operands.ok() && call->is_float != is_float) operands.fail("a result of another dtype", "that of q");
  if (operands.ok() && results.size() > 1) {
    auto scratch = results.get<ffi::Buffer<ffi::DataType::F32>>(1);
    const bool is =
        scratch.has_value() && (*scratch)->dimensions().size() == 4 && (*scratch)->dimensions()[0] == call->tokens;
    if (!is) return operands.fail("scratch of another form", "(T, groups, parts, floats) float32"), operands.error();
    call->partials = (*scratch)->typed_data(), call->parts = (*scratch)->dimensions()[2];
  }
  return operands.error();
}

}  // namespace dsv4

#endif  // DSV4_ATTEND_OP_H_
