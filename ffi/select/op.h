// select: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/read/select.py.
#ifndef DSV4_SELECT_OP_H_
#define DSV4_SELECT_OP_H_

#include <algorithm>
#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/float_bits.h"

namespace dsv4 {

struct SelectAttributes {
  int64_t layer, ratio, k, max_entries, raw;
};

}  // namespace dsv4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(dsv4::SelectAttributes, xla::ffi::StructMember<int64_t>("layer"),
                                      xla::ffi::StructMember<int64_t>("ratio"), xla::ffi::StructMember<int64_t>("k"),
                                      xla::ffi::StructMember<int64_t>("max_entries"),
                                      xla::ffi::StructMember<int64_t>("raw"));

namespace dsv4 {

struct SelectCall {
  int64_t tokens, heads, width, k;   // T, H, d
  const void* q;                     // (T, H, d) float or BFloat16
  bool is_float;                     // of q
  const float* weights;              // (T, H)
  const int32_t *slots, *positions;  // (T)

  const uint8_t *keys, *scale;    // of the layer: (N, E, d / 2), (N, E, d / group)
  int64_t group;                  // 16: E4M3 scales, 32: powers of two
  int64_t num_blocks, per_block;  // N, E
  const int32_t* table;           // (R, columns)
  int64_t num_slots, columns, ratio, max_entries;

  const float *cos, *sin;  // (T, pairs), or null
  int64_t pairs;

  int32_t* selected;  // (T, k)
  uint32_t* scratch;  // (scratch_tokens, scratch_row), or null
  int64_t scratch_tokens, scratch_row;

  // Entries that a token sees, holes among them: 0 for padding.
  DSV4_HOST_DEVICE int32_t visible(int64_t token) const {
    const int32_t slot = slots[token], position = positions[token];
    if (slot < 0 || slot >= num_slots || position < 0) return 0;
    const int64_t closed = (static_cast<uint32_t>(position) + 1) / static_cast<uint32_t>(ratio);
    return static_cast<int32_t>(closed < max_entries ? closed : max_entries);
  }

  // The pool's row of entry e of a slot, counted over all blocks; -1: none.
  DSV4_HOST_DEVICE int64_t key_row(int64_t slot, int64_t e) const {
    const int64_t column = e / per_block;
    if (column >= columns) return -1;
    const int64_t block = table[slot * columns + column];
    return block < 0 || block >= num_blocks ? -1 : block * per_block + (e - column * per_block);
  }
};

// Operands: q, weights, slots, positions, keys, scale, table; with raw cos and sin. Results: selected and, where there
// is something to choose, scratch, of which a row is a token's at a time.
inline ffi::Error bind_select(ffi::RemainingArgs args, ffi::RemainingRets results, const SelectAttributes& attributes,
                              SelectCall* call) {
  const auto [layer, ratio, k, max_entries, raw] = attributes;
  Operands operands("select", args);
  const Operands::Shape q = operands.shape_of_next(), keys = operands.shape_of_next(4),
                        scale = operands.shape_of_next(5), table = operands.shape_of_next(6);
  if (q.size() != 3 || keys.size() != 4 || scale.size() != 4 || table.size() != 2) {
    operands.fail("operands of other ranks", "q of 3 axes, keys and scale of 4, table of 2");
  }
  if (operands.ok() && !LayerOf::exists(layer, keys[0])) {
    operands.fail("layer " + std::to_string(layer), "0 to " + std::to_string(keys[0] - 1));
  }
  if (operands.ok() && (scale[3] < 1 || (scale[3] * 8 != keys[3] && scale[3] * 16 != keys[3]))) {
    operands.fail(std::to_string(scale[3]) + " scales for " + std::to_string(2 * keys[3]) + " values",
                  "one per 16 or 32");
  }
  if (operands.ok() && (ratio < 1 || ratio > INT32_MAX || k < 1)) {
    operands.fail("ratio " + std::to_string(ratio) + " and k " + std::to_string(k),
                  "at least 1, and a ratio below 2^31");
  }
  if (!operands.ok()) return operands.error();
  *call = SelectCall{};
  call->tokens = q[0], call->heads = q[1], call->width = q[2], call->k = k, call->ratio = ratio;
  call->num_blocks = LayerOf(layer, keys[0], keys[1]).length, call->per_block = keys[2], call->num_slots = table[0],
  call->columns = table[1];
  call->max_entries = std::min(max_entries, call->columns * call->per_block);
  call->q = operands.take("q", {ffi::DataType::F32, ffi::DataType::BF16}, {q[0], q[1], 2 * keys[3]});
  call->is_float = operands.dtype() == ffi::DataType::F32;
  call->weights = operands.take<float>("weights", {ffi::DataType::F32}, {q[0], q[1]});
  call->slots = operands.take<int32_t>("slots", {ffi::DataType::S32}, {q[0]});
  call->positions = operands.take<int32_t>("positions", {ffi::DataType::S32}, {q[0]});
  const uint8_t* codes = operands.take<uint8_t>("keys", {ffi::DataType::U8}, keys);
  const uint8_t* scales = operands.take<uint8_t>("scale", {ffi::DataType::U8}, {keys[0], keys[1], keys[2], scale[3]});
  call->table = operands.take<int32_t>("table", {ffi::DataType::S32}, table);
  call->group = 2 * keys[3] / scale[3];
  const LayerOf part(layer, keys[0], keys[1]);
  const int64_t first = part.index * keys[1] * keys[2];
  if (operands.ok()) call->keys = codes + first * keys[3], call->scale = scales + first * scale[3];
  if (operands.ok() && raw) {
    const Operands::Shape cos = operands.shape_of_next();
    call->pairs = cos.size() == 2 ? cos[1] : -1;
    call->cos = operands.take<float>("cos", {ffi::DataType::F32}, {q[0], call->pairs});
    call->sin = operands.take<float>("sin", {ffi::DataType::F32}, {q[0], call->pairs});
    if (2 * call->pairs > call->width) operands.fail("cos " + Operands::text(cos), "at most half of q");
  }
  for (size_t i = 0; operands.ok() && i < (call->max_entries > k ? 2 : 1); ++i) {
    auto result = results.get<ffi::AnyBuffer>(i);
    if (!result.has_value()) return operands.fail("no result " + std::to_string(i), "one more"), operands.error();
    const auto dims = (*result)->dimensions();
    const ffi::DataType dtype = i ? ffi::DataType::U32 : ffi::DataType::S32;
    if (dims.size() != 2 || (*result)->element_type() != dtype || (i == 0 && (dims[0] != q[0] || dims[1] != k))) {
      operands.fail("another result " + std::to_string(i), i ? "uint32 of 2 axes" : "int32 (tokens, k)");
    } else if (i == 0) {
      call->selected = static_cast<int32_t*>((*result)->untyped_data());
    } else {
      call->scratch = static_cast<uint32_t*>((*result)->untyped_data());
      call->scratch_tokens = dims[0], call->scratch_row = dims[1];
      if (dims[0] < 1 || dims[1] < call->max_entries) operands.fail("a small scratch", "some rows of max_entries");
    }
  }
  return operands.error();
}

}  // namespace dsv4

#endif  // DSV4_SELECT_OP_H_
