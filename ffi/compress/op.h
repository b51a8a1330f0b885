// compress and compress_indexer: what their handlers share. Contract and jax.numpy form:
// dsv4_jax/ops/write/compress.py.
//
// A segment brings the tokens of consecutive positions of one slot. Its windows that close become entries; a window's
// rows with a position below the segment's start lie in the tail, the others among the segment's tokens. The tokens
// that are the slot's newest go into the tail, over rows that the first windows may need: whoever writes a segment's
// tail has read those windows before. They are the segment's first head_windows, because a tail reaches back no
// further.
//
// A full tail holds k and z of tokens, a running tail the sums of the window's softmax after each of its newest tokens.
#ifndef DSV4_COMPRESS_OP_H_
#define DSV4_COMPRESS_OP_H_

#include <cstdint>

#include "common/operands.h"
#include "formats/float_bits.h"
#include "formats/stored_operands.h"
#include "math/modulo.h"
#include "math/running_sums.h"

namespace dsv4 {

struct Segment {
  int64_t slot, start, count;  // count 0: nothing to do

  DSV4_HOST_DEVICE int64_t end() const { return start + count; }
};

struct EntryPlace {
  int32_t block;    // -1: none
  uint32_t offset;  // within the block
};

struct Compress {
  // What the token of a decode step needs comes first and in that order: a kernel fetches its parameters as it reads
  // them, some 64 bytes at a time.
  const int32_t* slot_of;   // (S)
  const int32_t* start_of;  // (S)
  const int32_t* count_of;  // (S)
  const void* kv;           // (T, lanes, dim) float or BFloat16
  const void* gate;         // as kv
  const float* norm;        // (dim)
  const float* cos;         // (S, windows, rope_dim / 2) at the first position of each window that may close
  const float* sin;
  const float* ape;            // (ratio, lanes, dim)
  int64_t slots;               // R
  int64_t rows_a, rows_b;      // of the tail; rows_a: those of a running tail too
  Modulo modulo_a, modulo_b;   // rows_a, rows_b
  float *ka, *za, *kb, *zb;    // (R, rows, dim) of this layer; kb and zb null with one lane, all with a running tail
  float* sums;                 // (R, rows, kRunningSums, dim) of this layer; null with a full tail
  const int32_t* table;        // (R, columns)
  int64_t columns, per_block;  // per_block: entries a block holds
  Modulo modulo_block;         // per_block
  int64_t blocks;              // N
  float eps;
  bool kv_is_float;                          // and gate
  const int32_t* token_of;                   // (S, C)
  int64_t tokens, segments, width, windows;  // T, S, C, windows a segment
  int64_t ratio, lanes, dim, rope_dim;
  Modulo modulo_ratio;  // ratio

  DSV4_HOST_DEVICE Segment segment(int64_t s) const {
    Segment segment = {slot_of[s], start_of[s], count_of[s]};
    const bool live = segment.slot >= 0 && segment.slot < slots && segment.start >= 0 && segment.count > 0;
    segment.count = !live ? 0 : segment.count < width ? segment.count : width;
    return segment;
  }
  // The row of kv and gate of a segment's c-th token.
  DSV4_HOST_DEVICE int64_t token(int64_t s, int64_t c) const { return width == 1 ? s : token_of[s * width + c]; }
  DSV4_HOST_DEVICE int64_t first_entry(const Segment& segment) const {
    return modulo_ratio.quotient(static_cast<uint32_t>(segment.start));
  }
  DSV4_HOST_DEVICE bool closes(const Segment& segment, int64_t entry) const {
    return (entry + 1) * ratio <= segment.end();
  }
  // Fetches where an entry lies; looked at only by row_of, so that the fetch can take its time.
  DSV4_HOST_DEVICE EntryPlace look_up(int64_t slot, int64_t entry) const {
    const uint32_t column = modulo_block.quotient(static_cast<uint32_t>(entry));
    const auto offset = static_cast<uint32_t>(entry) - column * static_cast<uint32_t>(per_block);
    return {column < columns ? table[slot * columns + column] : -1, offset};
  }
  // The row of an entry, counted over all blocks of the layer; -1 if it has none.
  DSV4_HOST_DEVICE int64_t row_of(const EntryPlace& place) const {
    return place.block < 0 || place.block >= blocks ? -1 : place.block * per_block + place.offset;
  }
  DSV4_HOST_DEVICE int64_t entry_row(int64_t slot, int64_t entry) const { return row_of(look_up(slot, entry)); }
  // The row of a full tail's lane that a token lies in, and where it begins.
  DSV4_HOST_DEVICE uint32_t tail_row(int64_t position, int64_t lane) const {
    return lane == 0 ? modulo_a(static_cast<uint32_t>(position)) : modulo_b(static_cast<uint32_t>(position));
  }
  DSV4_HOST_DEVICE int64_t tail_offset(int64_t slot, int64_t position, int64_t lane) const {
    return (slot * (lane == 0 ? rows_a : rows_b) + tail_row(position, lane)) * dim;
  }
};

// Windows that may need the tail: a window's first rows, and with overlap those of the window after it.
inline int64_t head_windows(const Compress& call) { return call.lanes; }

// How many workers share a segment: one for the head windows and the tail, one for every other window.
inline int64_t workers_per_segment(const Compress& call) {
  return std::max<int64_t>(1, call.windows - head_windows(call) + 1);
}

// Takes the operands after the pool's: ka, za, [kb, zb] or sums, kv, gate, ape, norm, cos, sin, slots, starts, counts,
// tokens, table. blocks and per_block come from the pool.
inline void take_compress(Operands& operands, int64_t layer, int64_t layers, float eps, Compress* call) {
  const auto f32 = {ffi::DataType::F32}, s32 = {ffi::DataType::S32};
  const auto float_or_bf16 = {ffi::DataType::F32, ffi::DataType::BF16};
  const size_t after_tails = operands.left() - 11;
  const bool running = after_tails == 1;
  call->lanes = after_tails == 4 ? 2 : 1;
  if (after_tails != 1 && after_tails != 2 && after_tails != 4) {
    return operands.fail("a wrong number of operands", "1, 2 or 4 tails");
  }
  const Operands::Shape a = operands.shape_of_next(), b = operands.shape_of_next(2);
  const Operands::Shape kv = operands.shape_of_next(after_tails), ape = operands.shape_of_next(after_tails + 2);
  const Operands::Shape cos = operands.shape_of_next(after_tails + 4);
  const Operands::Shape token = operands.shape_of_next(after_tails + 9),
                        table = operands.shape_of_next(after_tails + 10);
  if (running ? a.size() != 5 : a.size() != 4 || (call->lanes == 2 && b.size() != 4)) {
    return operands.fail("tails of another rank", "(L, R, rows, d), or (L, R, rows, 5, d) running");
  }
  if (kv.size() != 2 || ape.size() != 2 || cos.size() != 3 || token.size() != 2 || table.size() != 2) {
    return operands.fail("kv, ape, cos, tokens or table of another rank", "2, 2, 3, 2 and 2 axes");
  }
  const LayerOf part(layer, layers, a[1]);
  call->slots = part.length, call->rows_a = a[2], call->rows_b = call->lanes == 2 ? b[2] : 0, call->dim = a.back();
  call->tokens = kv[0], call->ratio = ape[0], call->windows = cos[1], call->rope_dim = 2 * cos[2];
  call->segments = token[0], call->width = token[1], call->columns = table[1], call->eps = eps;
  const int64_t lanes_dim = call->lanes * call->dim;
  const auto tail = [&](const char* name, int64_t rows) {
    float* data = operands.take<float>(name, f32, {layers, a[1], rows, call->dim});
    return data + (data ? part.index * a[1] * rows * call->dim : 0);
  };
  call->sums = nullptr, call->ka = nullptr, call->za = nullptr;
  if (running) {
    const int64_t size = a[1] * call->rows_a * kRunningSums * call->dim;
    call->sums = operands.take<float>("sums", f32, {layers, a[1], call->rows_a, kRunningSums, call->dim});
    if (call->sums) call->sums += part.index * size;
  } else {
    call->ka = tail("ka", call->rows_a), call->za = tail("za", call->rows_a);
  }
  call->kb = call->lanes == 2 ? tail("kb", call->rows_b) : nullptr;
  call->zb = call->lanes == 2 ? tail("zb", call->rows_b) : nullptr;
  operands.updated();
  call->kv = operands.take("kv", float_or_bf16, {call->tokens, lanes_dim});
  const ffi::DataType dtype = operands.dtype();
  call->kv_is_float = dtype == ffi::DataType::F32;
  call->gate = operands.take("gate", {dtype}, {call->tokens, lanes_dim});
  call->ape = operands.take<float>("ape", f32, {call->ratio, lanes_dim});
  call->norm = operands.take<float>("norm", f32, {call->dim});
  call->cos = operands.take<float>("cos", f32, {call->segments, call->windows, call->rope_dim / 2});
  call->sin = operands.take<float>("sin", f32, {call->segments, call->windows, call->rope_dim / 2});
  call->slot_of = operands.take<int32_t>("slots", s32, {call->segments});
  call->start_of = operands.take<int32_t>("starts", s32, {call->segments});
  call->count_of = operands.take<int32_t>("counts", s32, {call->segments});
  call->token_of = operands.take<int32_t>("tokens", s32, {call->segments, call->width});
  call->table = operands.take<int32_t>("table", s32, {call->slots, call->columns});
  if (!operands.ok()) return;
  call->modulo_a = Modulo(static_cast<uint32_t>(std::max<int64_t>(call->rows_a, 1)));
  call->modulo_b = Modulo(static_cast<uint32_t>(std::max<int64_t>(call->rows_b, 1)));
  call->modulo_block = Modulo(static_cast<uint32_t>(std::max<int64_t>(call->per_block, 1)));
  call->modulo_ratio = Modulo(static_cast<uint32_t>(std::max<int64_t>(call->ratio, 1)));
  if (running && call->rows_a < 2)
    return operands.fail("a running tail of " + std::to_string(call->rows_a) + " rows", "2 at least");
  if (call->ratio < 1 || (!running && call->rows_a < call->lanes * call->ratio - 1) ||
      (call->lanes == 2 && call->rows_b < call->ratio - 1)) {
    return operands.fail("tails of " + std::to_string(call->rows_a) + " and " + std::to_string(call->rows_b) +
                             " rows for windows of " + std::to_string(call->ratio),
                         "lanes * ratio - 1 and ratio - 1 at least");
  }
  if (call->rope_dim > call->dim || call->dim % 2)
    return operands.fail("an odd or too small d", "an even d, RoPE part included");
  if (call->width < 1 || call->windows != (call->width - 1) / call->ratio + 1) {
    return operands.fail(
        std::to_string(call->windows) + " windows for " + std::to_string(call->width) + " tokens a segment",
        "(tokens - 1) / ratio + 1");
  }
  if (call->width == 1 && call->segments != call->tokens) {
    return operands.fail(std::to_string(call->segments) + " segments of one token", "as many as tokens");
  }
}

// compress's operands: nope, rope, inv_scale, then take_compress's.
inline void take_entries(Operands& operands, int64_t layer, float eps, Compress* call, RecordRows* record) {
  const StoredAs at = take_record_rows(operands, layer, record);
  call->blocks = at.count, call->per_block = at.length;
  if (operands.ok()) take_compress(operands, layer, at.layers, eps, call);
  if (operands.ok() && (call->dim != record->width() || call->rope_dim != record->rope_width)) {
    operands.fail("records of " + std::to_string(record->nope_width) + " + " + std::to_string(record->rope_width) +
                      " values for d " + std::to_string(call->dim) + " with " + std::to_string(call->rope_dim) +
                      " rotated",
                  "the same widths");
  }
}

inline ffi::Error bind_compress(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps,
                                Compress* call, RecordRows* record) {
  Operands operands("compress", args);
  take_entries(operands, layer, eps, call, record);
  return operands.ok() ? operands.expect_in_place(results) : operands.error();
}

// compress_indexer's operands: keys, scale, then take_compress's.
inline void take_keys(Operands& operands, int64_t layer, float eps, bool rotate, Compress* call, KeyRows* keys) {
  const StoredAs at = take_key_rows(operands, layer, keys);
  keys->rotate = rotate;
  call->blocks = at.count, call->per_block = at.length;
  if (operands.ok()) take_compress(operands, layer, at.layers, eps, call);
  if (operands.ok() && (call->dim != keys->dim || call->dim % keys->group)) {
    operands.fail("keys of " + std::to_string(keys->dim) + " values for d " + std::to_string(call->dim), "the same");
  }
  if (operands.ok() && rotate && (call->dim & (call->dim - 1))) {
    operands.fail("d " + std::to_string(call->dim) + " to rotate", "a power of two");
  }
}

inline ffi::Error bind_compress_indexer(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps,
                                        bool rotate, Compress* call, KeyRows* keys) {
  Operands operands("compress_indexer", args);
  take_keys(operands, layer, eps, rotate, call, keys);
  return operands.ok() ? operands.expect_in_place(results) : operands.error();
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_OP_H_
