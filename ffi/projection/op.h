// project: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/nn/projection.py.
#ifndef DSV4_PROJECTION_OP_H_
#define DSV4_PROJECTION_OP_H_

#include <cstdint>

#include "common/operands.h"

namespace dsv4 {

constexpr int64_t kWeightBlock = 128;  // rows and columns that share a scale

struct Projection {
  const void* x;         // (tokens, groups, columns) bfloat16 or float
  const uint8_t* codes;  // (rows, columns) E4M3; group g has rows g * rows / groups …
  const uint8_t* scale;  // (ceil(rows / 128), ceil(columns / 128)) E8M0
  void* y;               // (tokens, rows), as x
  int64_t tokens, groups, rows, columns;
  bool is_float;

  int64_t scale_columns() const { return (columns + kWeightBlock - 1) / kWeightBlock; }
};

// Operand: x (T, G, K).
inline void bind_input(Operands& operands, Projection* call) {
  const Operands::Shape x = operands.shape_of_next();
  if (x.size() != 3 || x[1] < 1) return operands.fail("x " + Operands::text(x), "(T, G, K)");
  call->tokens = x[0], call->groups = x[1], call->columns = x[2];
  call->x = operands.take("x", {ffi::DataType::BF16, ffi::DataType::F32}, x);
  call->is_float = operands.dtype() == ffi::DataType::F32;
}

// After it operands: codes (G * N, K), scale. Result `at`: y (T, G, N).
inline void bind_weight(Operands& operands, ffi::RemainingRets results, size_t at, Projection* call) {
  const Operands::Shape codes = operands.shape_of_next();
  if (!operands.ok()) return;
  if (codes.size() != 2 || codes[0] % call->groups)
    return operands.fail("codes " + Operands::text(codes), "rows for every group");
  call->rows = codes[0];
  call->codes = operands.take<uint8_t>("codes", {ffi::DataType::U8}, {call->rows, call->columns});
  call->scale = operands.take<uint8_t>("scale", {ffi::DataType::U8},
                                       {(call->rows + kWeightBlock - 1) / kWeightBlock, call->scale_columns()});
  auto y = results.get<ffi::AnyBuffer>(at);
  if (!y.has_value() || (*y)->element_count() != static_cast<size_t>(call->tokens * call->rows)) {
    operands.fail("a result of another shape", "(T, G, N)");
  } else if (((*y)->element_type() == ffi::DataType::F32) != call->is_float) {
    operands.fail("a result of another dtype", "that of x");
  } else {
    call->y = (*y)->untyped_data();
  }
}

// Operands: x (T, G, K), codes (G * N, K), scale. Result: y (T, G, N).
inline ffi::Error bind_projection(ffi::RemainingArgs args, ffi::RemainingRets results, Projection* call) {
  Operands operands("project", args);
  bind_input(operands, call);
  bind_weight(operands, results, 0, call);
  return operands.error();
}

}  // namespace dsv4

#endif  // DSV4_PROJECTION_OP_H_
