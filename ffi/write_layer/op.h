// write_layer: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/write/write_layer.py.
#ifndef DSV4_WRITE_LAYER_OP_H_
#define DSV4_WRITE_LAYER_OP_H_

#include "append_swa/op.h"
#include "compress/op.h"

namespace dsv4 {

struct WriteLayer {
  AppendSwa window;
  Compress entries;
  RecordRows record;
  Compress keys;  // segments 0 in a layer without indexer
  KeyRows key_rows;
};

constexpr size_t kWindowOperands = 12;  // of append_swa_fused

// The operands of append_swa_fused, of compress (of_entries of them) and, if there are more, of compress_indexer.
inline ffi::Error bind_write_layer(ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps,
                                   int64_t of_entries, WriteLayer* call) {
  Operands operands("write_layer", args);
  const int64_t of_keys = static_cast<int64_t>(args.size() - kWindowOperands) - of_entries;
  if (args.size() < kWindowOperands || of_entries < 0 || of_keys < 0) {
    operands.fail(std::to_string(args.size()) + " operands", "those of append_swa_fused and compress");
    return operands.error();
  }
  operands.begin_part(kWindowOperands);
  take_append_swa(operands, layer, true, eps, &call->window);
  operands.begin_part(of_entries);
  if (operands.ok()) take_entries(operands, layer, eps, &call->entries, &call->record);
  call->keys.segments = 0;
  if (operands.ok() && of_keys) {
    operands.begin_part(of_keys);
    take_keys(operands, layer, eps, true, &call->keys, &call->key_rows);
  }
  if (!operands.ok()) return operands.error();
  const bool is_float = call->window.kv_is_float;
  if (call->entries.kv_is_float != is_float || (of_keys && call->keys.kv_is_float != is_float)) {
    operands.fail("projections of different dtypes", "one dtype");
  }
  if (call->entries.width != 1 || (of_keys && call->keys.width != 1)) {
    operands.fail("segments of several tokens", "one token of a slot");
  }
  return operands.ok() ? operands.expect_in_place(results) : operands.error();
}

}  // namespace dsv4

#endif  // DSV4_WRITE_LAYER_OP_H_
