// read_window, read_entries and read_keys: what their handlers share. Contracts and jax.numpy forms:
// dsv4_jax/ops/read/window.py and entries.py.
//
// Each gives every one of S requests a table of K vectors. Where a vector lies follows from the request's slot and the
// vector's index alone; a vector that has no row is zero, and nothing is read for it.
#ifndef DSV4_READ_OP_H_
#define DSV4_READ_OP_H_

#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/float_bits.h"
#include "formats/stored_operands.h"

namespace dsv4 {

// a mod b or a / b for 0 <= a < 2^31 and b >= 1; the usual powers of two need no division.
DSV4_HOST_DEVICE uint32_t modulo(uint32_t a, uint32_t b) { return b & (b - 1) ? a % b : a & (b - 1); }

// Rows of a layer's ring: vector i of a request is ring row i, if that is part of the window up to `newest`.
struct WindowRows {
  int64_t slots, rows;
  int64_t window;
  const int32_t* slot_of;    // (S)
  const int32_t* newest_of;  // (S)

  // Counted over all slots; -1: none.
  DSV4_HOST_DEVICE int64_t row(int64_t request, int64_t i) const {
    const int32_t slot = slot_of[request], newest = newest_of[request];
    if (slot < 0 || slot >= slots || newest < i) return -1;
    const uint32_t age = modulo(static_cast<uint32_t>(newest) - static_cast<uint32_t>(i), static_cast<uint32_t>(rows));
    return age < window ? static_cast<int64_t>(slot) * rows + i : -1;
  }
};

// Entries of a layer's pool: vector i of a request is its entry i, or the i-th of those selected.
struct EntryRows {
  int64_t slots, blocks, per_block, columns, per_request;
  const int32_t* table;     // (R, columns)
  const int32_t* slot_of;   // (S)
  const int32_t* count_of;  // (S) entries that may be read
  const int32_t* selected;  // (S, per_request), or null

  // Counted over all blocks; -1: none.
  DSV4_HOST_DEVICE int64_t row(int64_t request, int64_t i) const {
    const int32_t slot = slot_of[request], count = count_of[request];
    const int64_t entry = selected ? selected[request * per_request + i] : i;
    if (slot < 0 || slot >= slots || entry < 0 || entry >= count) return -1;
    const uint32_t column = static_cast<uint32_t>(entry) / static_cast<uint32_t>(per_block);
    if (column >= columns) return -1;
    const int64_t block = table[slot * columns + column];
    return block < 0 || block >= blocks ? -1 : block * per_block + (entry - static_cast<int64_t>(column) * per_block);
  }
};

// One layer's records, and the vectors that come of them.
struct ReadRecords {
  int64_t requests, per_request;                // S, K
  int64_t nope_width, rope_width, scale_width;  // scale_width 0: one float a record
  const uint8_t* nope;                          // rows of nope_width E4M3
  const BFloat16* rope;                         // rows of rope_width
  const void* scale;                            // float, or rows of scale_width E8M0
  void* out;                                    // (S, K, nope_width + rope_width) float or BFloat16
  bool out_is_float;

  DSV4_HOST_DEVICE int64_t vectors() const { return requests * per_request; }
};

// One layer's FP4 keys, and the vectors that come of them.
struct ReadKeys {
  int64_t requests, per_request, dim, group;  // group: values that share a scale, 16: E4M3, 32: E8M0
  const uint8_t* keys;                        // rows of dim / 2
  const uint8_t* scale;                       // rows of dim / group
  float* out;                                 // (S, K, dim)

  DSV4_HOST_DEVICE int64_t vectors() const { return requests * per_request; }
};

// The result's data after a check of its shape and dtype.
inline void* take_result(ffi::RemainingRets results, const Operands::Shape& expected, Operands& operands,
                         bool* is_float) {
  auto result = results.get<ffi::AnyBuffer>(0);
  if (!result.has_value()) return operands.fail("no result", "one"), nullptr;
  const auto dims = (*result)->dimensions();
  *is_float = (*result)->element_type() == ffi::DataType::F32;
  if (Operands::Shape(dims.begin(), dims.end()) != expected)
    operands.fail("a result of another shape", Operands::text(expected));
  if (!*is_float && (*result)->element_type() != ffi::DataType::BF16) {
    operands.fail("a result of another dtype", "bfloat16 or float32");
  }
  return (*result)->untyped_data();
}

// Takes nope, rope and inv_scale, arrays (L, R, W, ...) or (L, N, E, ...), and points `call` at the layer; answers with
// the shape of nope, whose second size are the layer's slots or blocks.
inline Operands::Shape take_records(Operands& operands, int64_t layer, ReadRecords* call) {
  RecordRows record = {};
  const StoredAs at = take_record_rows(operands, layer, &record);
  call->nope_width = record.nope_width, call->rope_width = record.rope_width, call->scale_width = record.scale_width;
  call->nope = record.nope, call->rope = record.rope;
  call->scale = record.scales ? static_cast<const void*>(record.scales) : record.inv_scale;
  return {at.layers, at.count, at.length, record.nope_width};
}

// Operands: nope, rope, inv_scale (L, R, W, ...), slots (S), newest (S).
inline ffi::Error bind_read_window(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, int64_t window,
                                   ReadRecords* call, WindowRows* rows) {
  Operands operands("read_window", args);
  const Operands::Shape ring = take_records(operands, layer, call);
  if (!operands.ok()) return operands.error();
  const Operands::Shape requests = operands.shape_of_next();
  call->requests = requests.empty() ? -1 : requests[0], call->per_request = ring[2];
  rows->slots = ring[1], rows->rows = ring[2], rows->window = window;
  rows->slot_of = operands.take<int32_t>("slots", {ffi::DataType::S32}, {call->requests});
  rows->newest_of = operands.take<int32_t>("newest", {ffi::DataType::S32}, {call->requests});
  call->out = take_result(results, {call->requests, ring[2], call->nope_width + call->rope_width}, operands,
                          &call->out_is_float);
  return operands.error();
}

// Takes table (R, columns), slots (S), counts (S) and, if there is one more operand, selected (S, K).
inline void take_entry_rows(Operands& operands, const Operands::Shape& pool, int64_t per_request, EntryRows* rows) {
  const Operands::Shape table = operands.shape_of_next(), requests = operands.shape_of_next(1);
  if (table.size() != 2 || requests.size() != 1) return operands.fail("table or slots of another rank", "2 axes and 1");
  rows->slots = table[0], rows->columns = table[1], rows->blocks = pool[1], rows->per_block = pool[2];
  rows->per_request = per_request;
  rows->table = operands.take<int32_t>("table", {ffi::DataType::S32}, table);
  rows->slot_of = operands.take<int32_t>("slots", {ffi::DataType::S32}, requests);
  rows->count_of = operands.take<int32_t>("counts", {ffi::DataType::S32}, requests);
  rows->selected =
      operands.left() ? operands.take<int32_t>("selected", {ffi::DataType::S32}, {requests[0], per_request}) : nullptr;
}

// S and K of a call are those of its result.
inline bool result_table(ffi::RemainingRets results, int64_t* requests, int64_t* per_request) {
  auto result = results.get<ffi::AnyBuffer>(0);
  if (!result.has_value() || (*result)->dimensions().size() != 3) return false;
  *requests = (*result)->dimensions()[0], *per_request = (*result)->dimensions()[1];
  return true;
}

// Operands: nope, rope, inv_scale (L, N, E, ...), then take_entry_rows's.
inline ffi::Error bind_read_entries(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                                    ReadRecords* call, EntryRows* rows) {
  Operands operands("read_entries", args);
  const Operands::Shape pool = take_records(operands, layer, call);
  if (!result_table(results, &call->requests, &call->per_request)) operands.fail("a result of another rank", "3 axes");
  if (!operands.ok()) return operands.error();
  take_entry_rows(operands, pool, call->per_request, rows);
  call->out = take_result(results, {call->requests, call->per_request, call->nope_width + call->rope_width}, operands,
                          &call->out_is_float);
  return operands.error();
}

// Operands: keys (L, N, E, d / 2), scale (L, N, E, d / group), then take_entry_rows's.
inline ffi::Error bind_read_keys(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, ReadKeys* call,
                                 EntryRows* rows) {
  Operands operands("read_keys", args);
  KeyRows keys = {};
  const StoredAs at = take_key_rows(operands, layer, &keys);
  if (!result_table(results, &call->requests, &call->per_request)) operands.fail("a result of another rank", "3 axes");
  if (!operands.ok()) return operands.error();
  call->dim = keys.dim, call->group = keys.group, call->keys = keys.keys, call->scale = keys.scale;
  take_entry_rows(operands, {at.layers, at.count, at.length}, call->per_request, rows);
  bool is_float = false;
  call->out =
      static_cast<float*>(take_result(results, {call->requests, call->per_request, call->dim}, operands, &is_float));
  if (!is_float) operands.fail("a result of another dtype", "float32");
  return operands.error();
}

}  // namespace dsv4

#endif  // DSV4_READ_OP_H_
