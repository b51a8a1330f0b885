// Taking the records or keys that a layer has stored among a call's operands.
#ifndef DSV4_FORMATS_STORED_OPERANDS_H_
#define DSV4_FORMATS_STORED_OPERANDS_H_

#include <cstdint>
#include <string>

#include "common/operands.h"
#include "formats/key_rows.h"
#include "formats/record_rows.h"

namespace dsv4 {

// Rows of a layer as (count, length): the ring of every slot, or every block of a pool.
struct StoredAs {
  int64_t layers;  // of the operands; 1 where they have no axis of layers
  int64_t layer;   // the one that is meant, 0 where that is all of them
  int64_t stride;  // slots or blocks of one layer
  int64_t count;   // of what is meant
  int64_t length;

  int64_t first_row() const { return layer * stride * length; }
};

// The shape of the first operand without its last axis, checked: (L, count, length), or (count, length) with layer -1
// where the axis of layers is `optional`.
inline StoredAs take_stored_as(Operands& operands, const char* name, int64_t layer, bool optional = false) {
  const Operands::Shape shape = operands.shape_of_next();
  const bool stacked = shape.size() == 4;
  if (!stacked && !(optional && shape.size() == 3)) {
    operands.fail(name + (" " + Operands::text(shape)), optional ? "([layers,] slots, rows, width)" : "4 axes");
    return {};
  }
  const int64_t layers = stacked ? shape[0] : 1, count = shape[shape.size() - 3], length = shape[shape.size() - 2];
  if (stacked ? !LayerOf::exists(layer, layers) : layer != -1) {
    const std::string got = "layer " + std::to_string(layer);
    optional
        ? operands.fail(got + " for " + name + " " + Operands::text(shape), "one of its layers, or -1 if it has none")
        : operands.fail(got, "0 to " + std::to_string(layers - 1));
  }
  if (length < 1 || length > INT32_MAX) operands.fail(name + (" " + Operands::text(shape)), "1 to 2^31 - 1 rows");
  const LayerOf part(stacked ? layer : 0, layers, count);
  return {layers, part.index, count, part.length, length};
}

// The shape of an operand that goes with the rows, one axis more for every width.
inline Operands::Shape with_widths(const StoredAs& at, bool stacked, std::initializer_list<int64_t> widths) {
  Operands::Shape shape =
      stacked ? Operands::Shape{at.layers, at.stride, at.length} : Operands::Shape{at.stride, at.length};
  shape.insert(shape.end(), widths);
  return shape;
}

// Takes nope, rope and inv_scale, and points `record` at the layer.
inline StoredAs take_record_rows(Operands& operands, int64_t layer, RecordRows* record, bool optional = false) {
  const StoredAs at = take_stored_as(operands, "nope", layer, optional);
  if (!operands.ok()) return at;
  const Operands::Shape nope = operands.shape_of_next(), rope = operands.shape_of_next(1),
                        scale = operands.shape_of_next(2);
  const bool stacked = nope.size() == 4, grouped = scale.size() == nope.size();
  const int64_t n = nope.back(), r = rope.empty() ? -1 : rope.back(), groups = grouped ? scale.back() : 0;
  if (grouped && (n % kE8M0Group || kE8M0Group * groups < n)) {
    operands.fail("inv_scale " + Operands::text(scale), "one for every 64 of " + std::to_string(n) + " values");
  }
  const int64_t first = at.first_row();
  const auto at_first = [&](auto* data, int64_t width) { return data ? data + first * width : nullptr; };
  *record = {};
  record->nope = at_first(operands.take<uint8_t>("nope", {ffi::DataType::U8}, nope), n);
  record->rope = at_first(operands.take<BFloat16>("rope", {ffi::DataType::BF16}, with_widths(at, stacked, {r})), r);
  if (grouped) {
    const Operands::Shape expected = with_widths(at, stacked, {groups});
    record->scales = at_first(operands.take<uint8_t>("inv_scale", {ffi::DataType::U8}, expected), groups);
  } else {
    const Operands::Shape expected = with_widths(at, stacked, {});
    record->inv_scale = at_first(operands.take<float>("inv_scale", {ffi::DataType::F32}, expected), 1);
  }
  record->scale_width = groups, record->nope_width = n, record->rope_width = r;
  return at;
}

// Takes keys and scale, and points `keys` at the layer.
inline StoredAs take_key_rows(Operands& operands, int64_t layer, KeyRows* keys) {
  const StoredAs at = take_stored_as(operands, "keys", layer);
  if (!operands.ok()) return at;
  const Operands::Shape codes = operands.shape_of_next(), scale = operands.shape_of_next(1);
  const int64_t dim = 2 * codes[3], groups = scale.size() == 4 ? scale[3] : 0;
  if (groups < 1 || (groups * 16 != dim && groups * 32 != dim)) {
    operands.fail(std::to_string(groups) + " scales for " + std::to_string(dim) + " values", "one per 16 or 32");
    return at;
  }
  const int64_t first = at.first_row();
  uint8_t* data = operands.take<uint8_t>("keys", {ffi::DataType::U8}, codes);
  uint8_t* scales = operands.take<uint8_t>("scale", {ffi::DataType::U8}, with_widths(at, true, {groups}));
  if (operands.ok()) *keys = {data + first * codes[3], scales + first * groups, dim, dim / groups, false};
  return at;
}

}  // namespace dsv4

#endif  // DSV4_FORMATS_STORED_OPERANDS_H_
