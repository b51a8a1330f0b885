// apply_experts: what its handlers share. Contract and jax.numpy form: dsv4_jax/ops/nn/experts.py.
#ifndef DSV4_EXPERTS_OP_H_
#define DSV4_EXPERTS_OP_H_

#include <cstdint>

#include "common/operands.h"

namespace dsv4 {

constexpr int64_t kExpertGroup = 32;  // values of a row that share a scale

struct ExpertMatrix {
  const uint8_t* codes;  // (experts, rows, columns / 2), the even column in the low four bits
  const uint8_t* scale;  // (experts, rows, columns / 32) E8M0
};

struct ExpertCall {
  const void* x;            // (tokens, hidden) bfloat16 or float
  const int32_t* picks;     // (tokens, k)
  const float* weights;     // (tokens, k)
  ExpertMatrix w1, w2, w3;  // w1, w3: inner rows of hidden columns; w2: hidden rows of inner columns
  void* y;                  // (tokens, hidden), as x
  int64_t tokens, k, experts, hidden, inner;
  bool is_float;
};

// Operands: x (T, hidden), picks (T, k), weights (T, k), then codes and scale of w1, w2 and w3. Result: y (T, hidden).
inline ffi::Error bind_experts(ffi::RemainingArgs args, ffi::RemainingRets results, ExpertCall* call) {
  Operands operands("apply_experts", args);
  const Operands::Shape x = operands.shape_of_next(), picks = operands.shape_of_next(1), w1 = operands.shape_of_next(3);
  if (x.size() != 2 || picks.size() != 2 || w1.size() != 3) {
    operands.fail("x, picks or w1 of another rank", "2, 2 and 3 axes");
    return operands.error();
  }
  call->tokens = x[0], call->hidden = x[1], call->k = picks[1], call->experts = w1[0], call->inner = w1[1];
  if (call->hidden % kExpertGroup || call->inner % kExpertGroup) {
    operands.fail("experts of " + std::to_string(call->inner) + " by " + std::to_string(call->hidden),
                  "multiples of 32");
  }
  call->x = operands.take("x", {ffi::DataType::BF16, ffi::DataType::F32}, x);
  call->is_float = operands.dtype() == ffi::DataType::F32;
  call->picks = operands.take<int32_t>("picks", {ffi::DataType::S32}, {call->tokens, call->k});
  call->weights = operands.take<float>("weights", {ffi::DataType::F32}, {call->tokens, call->k});
  const auto take = [&](const char* name, int64_t rows, int64_t columns) {
    ExpertMatrix matrix;
    matrix.codes = operands.take<uint8_t>(name, {ffi::DataType::U8}, {call->experts, rows, columns / 2});
    matrix.scale = operands.take<uint8_t>(name, {ffi::DataType::U8}, {call->experts, rows, columns / kExpertGroup});
    return matrix;
  };
  call->w1 = take("w1", call->inner, call->hidden);
  call->w2 = take("w2", call->hidden, call->inner);
  call->w3 = take("w3", call->inner, call->hidden);
  auto y = results.get<ffi::AnyBuffer>(0);
  if (!y.has_value() || (*y)->element_count() != static_cast<size_t>(call->tokens * call->hidden)) {
    operands.fail("a result of another shape", "(T, hidden)");
  } else if (((*y)->element_type() == ffi::DataType::F32) != call->is_float) {
    operands.fail("a result of another dtype", "that of x");
  } else {
    call->y = (*y)->untyped_data();
  }
  return operands.error();
}

}  // namespace dsv4

#endif  // DSV4_EXPERTS_OP_H_
