// Reading and checking the operands of a custom call.
#ifndef DSV4_COMMON_OPERANDS_H_
#define DSV4_COMMON_OPERANDS_H_

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

namespace ffi = xla::ffi;

// As a call's layer: slots and blocks are counted through all layers of the stacks, slot s of layer l of L being slot
// l * R + s of L * R. So a layer that is known on the device alone is a number among the operands, and no kernel knows.
constexpr int64_t kEveryLayer = -2;

// A stack (L, n, ...) as its layer and that layer's length: of every layer as one, (1, L * n, ...).
struct LayerOf {
  int64_t index, length;

  LayerOf(int64_t layer, int64_t layers, int64_t n)
      : index(layer == kEveryLayer ? 0 : layer), length(layer == kEveryLayer ? layers * n : n) {}
  static bool exists(int64_t layer, int64_t layers) { return layer == kEveryLayer || (layer >= 0 && layer < layers); }
};

// Takes a call's operands one after another; the first mistake is kept, and what follows it means nothing.
class Operands {
 public:
  using Shape = std::vector<int64_t>;

  Operands(const char* op, ffi::RemainingArgs args) : op_(op), args_(args), end_(args.size()) {}

  ffi::Error error() const { return error_.empty() ? ffi::Error::Success() : ffi::Error::InvalidArgument(error_); }
  bool ok() const { return error_.empty(); }
  size_t left() const { return end_ - next_; }    // of the part
  ffi::DataType dtype() const { return dtype_; }  // of the operand taken last

  // Begins a part of n operands, for a call that is made of several.
  void begin_part(size_t n) { first_ = data_.size(), end_ = next_ + n; }
  // The operands taken since the part began are updated in place.
  void updated() { updated_.insert(updated_.end(), data_.begin() + first_, data_.end()); }

  // The shape of an operand that is still to be taken.
  Shape shape_of_next(size_t ahead = 0) const {
    const auto buffer = args_.get<ffi::AnyBuffer>(next_ + ahead);
    if (!buffer.has_value()) return {};
    const auto dims = buffer->dimensions();
    return Shape(dims.begin(), dims.end());
  }

  // The next operand's data, after a check of its dtype and shape (-1: any size there).
  template <typename T = void>
  T* take(const char* name, std::initializer_list<ffi::DataType> dtypes, const Shape& expected) {
    const auto buffer = args_.get<ffi::AnyBuffer>(next_++);
    if (!buffer.has_value()) {
      fail(std::string("no operand ") + name, "one more");
      return nullptr;
    }
    dtype_ = buffer->element_type();
    if (std::find(dtypes.begin(), dtypes.end(), dtype_) == dtypes.end()) {
      std::string names;
      for (const ffi::DataType dtype : dtypes) names += (names.empty() ? "" : " or ") + dtype_name(dtype);
      fail(std::string(name) + " of another dtype", names);
      return nullptr;
    }
    const auto dims = buffer->dimensions();
    bool fits = dims.size() == expected.size();
    for (size_t i = 0; fits && i < expected.size(); ++i) fits = expected[i] == -1 || expected[i] == dims[i];
    if (!fits) {
      fail(name + (" " + text(Shape(dims.begin(), dims.end()))), text(expected));
      return nullptr;
    }
    data_.push_back(buffer->untyped_data());
    return static_cast<T*>(buffer->untyped_data());
  }

  void fail(const std::string& got, const std::string& expected) {
    if (error_.empty()) error_ = std::string(op_) + ": got " + got + "; expected " + expected + ".";
  }

  // The results are the operands updated in place, in order; elsewhere they would lack the rows a call leaves alone.
  ffi::Error expect_in_place(ffi::RemainingRets results) const {
    for (size_t i = 0; i < std::max(results.size(), updated_.size()); ++i) {
      auto result = results.get<ffi::AnyBuffer>(i);
      if (!result.has_value() || i >= updated_.size() || (*result)->untyped_data() != updated_[i]) {
        return ffi::Error::Internal(std::string(op_) + ": result " + std::to_string(i) +
                                    " and its operand are different buffers; they must alias.");
      }
    }
    return ffi::Error::Success();
  }

  static std::string text(const Shape& shape) {
    std::string text = "(";
    for (size_t i = 0; i < shape.size(); ++i) {
      text += (i ? ", " : "") + (shape[i] == -1 ? std::string("any") : std::to_string(shape[i]));
    }
    return text + ")";
  }

 private:
  static std::string dtype_name(ffi::DataType dtype) {
    switch (dtype) {
      case ffi::DataType::U8:
        return "uint8";
      case ffi::DataType::S32:
        return "int32";
      case ffi::DataType::BF16:
        return "bfloat16";
      case ffi::DataType::F32:
        return "float32";
      default:
        return "another dtype";
    }
  }

  const char* op_;
  ffi::RemainingArgs args_;
  size_t next_ = 0, end_, first_ = 0;  // operands: the next, the end of the part; the first of the part in data_
  ffi::DataType dtype_ = ffi::DataType::INVALID;
  std::vector<void*> data_, updated_;
  std::string error_;
};

}  // namespace dsv4

#endif  // DSV4_COMMON_OPERANDS_H_
