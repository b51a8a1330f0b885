// compress and compress_indexer on the CPU, for any geometry.
#include <algorithm>
#include <array>
#include <vector>

#include "compress.h"
#include "export.h"
#include "float_math.h"
#include "fp4.h"
#include "parallel_for.h"
#include "quantise.h"
#include "rms_norm_rope.h"
#include "vector_clones.h"

namespace dsv4 {
namespace {

// Rows are summed in groups of eight; the groups' sums are added in neighbouring pairs, and so on. This is the GPU's order.
constexpr size_t kRowsPerSum = 8;
constexpr int64_t kChannels = 64;  // channels pooled at a time

struct Channels : std::array<float, kChannels> {};

Channels add(const Channels& a, const Channels& b) {
  Channels sum;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = a[i] + b[i];
  return sum;
}

// Adds a row's weights e^(z - top), and its weighted k. Without FMA instructions std::fma is a call.
DSV4_VECTOR_CLONES void weigh(const Channels& z, const Channels& k, const Channels& top, Channels* weight, Channels* sum) {
  for (size_t i = 0; i < z.size(); ++i) {
    const float e = exp_of_negative(z[i] - top[i]);
    (*weight)[i] += e;
    (*sum)[i] = fused(e, k[i], (*sum)[i]);
  }
}

// A row of a window: kv and gate of a fresh token, or k and z of the tail.
template <typename T>
struct WindowRow {
  const T *kv, *gate;
  const float *k, *z;  // z is ape for a fresh token

  void load_z(int64_t channel, int64_t n, float* out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = gate ? to_float(gate[channel + i]) + z[channel + i] : z[channel + i];
  }
  void load_k(int64_t channel, int64_t n, float* out) const {
    for (int64_t i = 0; i < n; ++i) out[i] = kv ? to_float(kv[channel + i]) : k[channel + i];
  }
};

template <typename T>
class Worker {
 public:
  explicit Worker(const Compress& call) : call_(call), rows_(call.lanes * call.ratio), pooled_(call.dim) {}

  // The k-th share of segment s; write(row, values) stores an entry.
  template <typename Write>
  void run(int64_t s, int64_t k, const Write& write) {
    const Segment segment = call_.segment(s);
    const int64_t head = head_windows(call_), first = k == 0 ? 0 : head - 1 + k, last = k == 0 ? head : first + 1;
    for (int64_t w = first; w < last && w < call_.windows; ++w) {
      const int64_t entry = call_.first_entry(segment) + w;
      if (segment.count == 0 || !call_.closes(segment, entry)) break;
      const int64_t row = call_.entry_row(segment.slot, entry);
      if (row < 0) continue;
      pool(s, segment, entry);
      normalise(s, w);
      write(row, pooled_.data());
    }
    if (k == 0) store_tail(s, segment);
  }

 private:
  WindowRow<T> fresh_row(int64_t s, const Segment& segment, int64_t position, int64_t lane) const {
    const int64_t offset = call_.token(s, position - segment.start) * call_.lanes * call_.dim + lane * call_.dim;
    return {static_cast<const T*>(call_.kv) + offset, static_cast<const T*>(call_.gate) + offset, nullptr,
            call_.ape + (position % call_.ratio * call_.lanes + lane) * call_.dim};
  }

  // A softmax per channel over the rows of an entry's window: with two lanes, lane a of the window before comes first.
  void pool(int64_t s, const Segment& segment, int64_t entry) {
    for (int64_t i = 0; i < call_.lanes * call_.ratio; ++i) {
      const int64_t lane = i / call_.ratio;
      const int64_t position = (entry - (call_.lanes - 1 - lane)) * call_.ratio + i % call_.ratio;
      const bool is_a = lane == 0;  // the only lane, or lane a
      if (position >= segment.start) {
        rows_[i] = fresh_row(s, segment, position, lane);
      } else if (position >= 0) {
        const int64_t offset = call_.tail_offset(segment.slot, position, is_a ? call_.rows_a : call_.rows_b);
        rows_[i] = {nullptr, nullptr, (is_a ? call_.ka : call_.kb) + offset, (is_a ? call_.za : call_.zb) + offset};
      } else {
        rows_[i] = {nullptr, nullptr, nullptr, nullptr};  // no such token: weight 0
      }
    }
    for (int64_t channel = 0; channel < call_.dim; channel += kChannels) {
      pool_channels(channel, std::min(kChannels, call_.dim - channel));
    }
  }

  void pool_channels(int64_t channel, int64_t n) {
    Channels top, z{}, k{};
    top.fill(-INFINITY);
    std::fill(top.begin() + n, top.end(), 0.0f);
    for (const WindowRow<T>& row : rows_) {
      if (!row.z) continue;
      row.load_z(channel, n, z.data());
      for (int64_t i = 0; i < n; ++i) top[i] = larger(top[i], z[i]);
    }
    weights_.clear(), sums_.clear();
    for (size_t r = 0; r < rows_.size(); ++r) {
      if (r % kRowsPerSum == 0) weights_.push_back({}), sums_.push_back({});
      if (!rows_[r].z) continue;
      rows_[r].load_z(channel, n, z.data());
      rows_[r].load_k(channel, n, k.data());
      weigh(z, k, top, &weights_.back(), &sums_.back());
    }
    add_pairs(weights_);
    add_pairs(sums_);
    for (int64_t i = 0; i < n; ++i) pooled_[channel + i] = divide(sums_[0][i], weights_[0][i]);
  }

  // RMSNorm, and RoPE at the first position of the window.
  void normalise(int64_t s, int64_t window) {
    const int64_t pair = (s * call_.windows + window) * (call_.rope_dim / 2);
    rms_norm_rope_(pooled_.data(), call_.dim, call_.rope_dim, call_.norm, call_.cos + pair, call_.sin + pair, call_.eps);
  }

  void store_tail(int64_t s, const Segment& segment) const {
    for (int64_t lane = 0; lane < call_.lanes; ++lane) {
      const int64_t rows = lane == 0 ? call_.rows_a : call_.rows_b;
      float *k = lane == 0 ? call_.ka : call_.kb, *z = lane == 0 ? call_.za : call_.zb;
      for (int64_t c = std::max<int64_t>(0, segment.count - rows); c < segment.count; ++c) {
        const int64_t position = segment.start + c;
        const WindowRow<T> row = fresh_row(s, segment, position, lane);
        const int64_t offset = call_.tail_offset(segment.slot, position, rows);
        row.load_k(0, call_.dim, k + offset);
        row.load_z(0, call_.dim, z + offset);
      }
    }
  }

  const Compress& call_;
  std::vector<WindowRow<T>> rows_;
  std::vector<float> pooled_;
  RmsNormRope rms_norm_rope_;
  std::vector<Channels> weights_, sums_;  // per group of rows
};

template <typename T, typename Write>
void run_as(ffi::ThreadPool& pool, const Compress& call, const Write& write) {
  const int64_t shares = workers_per_segment(call);
  parallel_for(pool, call.segments * shares, 2, [&](int64_t begin, int64_t end) {
    Worker<T> worker(call);
    for (int64_t i = begin; i < end; ++i) worker.run(i / shares, i % shares, write);
  });
}

template <typename Write>
void run(ffi::ThreadPool& pool, const Compress& call, bool kv_is_float, const Write& write) {
  kv_is_float ? run_as<float>(pool, call, write) : run_as<BFloat16>(pool, call, write);
}

ffi::Error compress(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps) {
  Compress call;
  RecordRows record;
  bool kv_is_float;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record, &kv_is_float);
  if (error.failure()) return error;
  const int64_t rope_dim = call.rope_dim, nope_dim = call.dim - rope_dim;
  run(pool, call, kv_is_float, [&](int64_t row, const float* values) {
    uint8_t* nope = record.nope + row * nope_dim;
    if (record.scales) {
      quantise_row_by_groups(values, nope_dim, nope, record.scales + row * record.scale_width, record.scale_width);
    } else {
      record.inv_scale[row] = quantise_row(values, nope_dim, nope);
    }
    for (int64_t i = 0; i < rope_dim; ++i) record.rope[row * rope_dim + i] = to_bf16(values[nope_dim + i]);
  });
  return ffi::Error::Success();
}

// Times the orthonormal Hadamard matrix in natural order; n is a power of two.
void rotate(float* x, int64_t n) {
  for (int64_t stride = 1; stride < n; stride *= 2) {
    for (int64_t i = 0; i < n; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  const float scale = divide(1.0f, std::sqrt(static_cast<float>(n)));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

void write_key(const KeyRows& keys, int64_t dim, int64_t row, float* x) {
  if (keys.rotate) rotate(x, dim);
  uint8_t* codes = keys.keys + row * (dim / 2);
  for (int64_t first = 0; first < dim; first += keys.group) {
    uint32_t amax = 0;
    for (int64_t i = first; i < first + keys.group; ++i) amax = std::max(amax, magnitude_bits(x[i]));
    const GroupScale scale(amax, keys.group == 16);
    keys.scale[row * (dim / keys.group) + first / keys.group] = scale.byte;
    for (int64_t i = first; i < first + keys.group; i += 2) {
      codes[i / 2] = static_cast<uint8_t>(scale.encode(x[i]) | (scale.encode(x[i + 1]) << 4));
    }
  }
}

ffi::Error compress_indexer(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps, bool rotate) {
  Compress call;
  KeyRows keys;
  bool kv_is_float;
  const ffi::Error error = bind_compress_indexer(args, results, layer, eps, rotate, &call, &keys, &kv_is_float);
  if (error.failure()) return error;
  run(pool, call, kv_is_float, [&](int64_t row, float* values) { write_key(keys, call.dim, row, values); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Compress);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Compress, dsv4::compress,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"));
DSV4_EXPORT_HANDLER(Dsv4CompressIndexer);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4CompressIndexer, dsv4::compress_indexer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps")
                                  .Attr<bool>("rotate"));
