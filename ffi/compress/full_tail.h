// compress on the CPU with a full tail: a softmax over the rows of a window when it closes.
#ifndef DSV4_COMPRESS_FULL_TAIL_H_
#define DSV4_COMPRESS_FULL_TAIL_H_

#include <algorithm>
#include <cmath>
#include <vector>

#include "compress/worker.h"
#include "formats/float_math.h"

namespace dsv4 {

// Rows are summed in groups of eight; the groups' sums are added in neighbouring pairs, and so on. This is the GPU's
// order.
constexpr size_t kRowsPerSum = 8;

inline Channels add(const Channels& a, const Channels& b) {
  Channels sum;
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = a[i] + b[i];
  return sum;
}

// Adds a row's weights e^(z - top), and its weighted k. Without FMA instructions std::fma is a call.
DSV4_VECTOR_CLONES inline void weigh(const Channels& z, const Channels& k, const Channels& top, Channels* weight,
                                     Channels* sum) {
  for (size_t i = 0; i < z.size(); ++i) {
    const float e = exp_of_negative(z[i] - top[i]);
    (*weight)[i] += e;
    (*sum)[i] = fused(e, k[i], (*sum)[i]);
  }
}

template <typename T>
class FullTailWorker : CompressWorker<T> {
 public:
  explicit FullTailWorker(const Compress& call) : CompressWorker<T>(call), rows_(call.lanes * call.ratio) {}

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
  // A softmax per channel over the rows of an entry's window: with two lanes, lane a of the window before comes first.
  void pool(int64_t s, const Segment& segment, int64_t entry) {
    for (int64_t i = 0; i < call_.lanes * call_.ratio; ++i) {
      const int64_t lane = i / call_.ratio;
      const int64_t position = (entry - (call_.lanes - 1 - lane)) * call_.ratio + i % call_.ratio;
      const bool is_a = lane == 0;  // the only lane, or lane a
      if (position >= segment.start) {
        rows_[i] = fresh_row(s, segment, position, lane);
      } else if (position >= 0) {
        const int64_t offset = call_.tail_offset(segment.slot, position, lane);
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

  void store_tail(int64_t s, const Segment& segment) const {
    for (int64_t lane = 0; lane < call_.lanes; ++lane) {
      const int64_t rows = lane == 0 ? call_.rows_a : call_.rows_b;
      float *k = lane == 0 ? call_.ka : call_.kb, *z = lane == 0 ? call_.za : call_.zb;
      for (int64_t c = std::max<int64_t>(0, segment.count - rows); c < segment.count; ++c) {
        const int64_t position = segment.start + c;
        const WindowRow<T> row = fresh_row(s, segment, position, lane);
        const int64_t offset = call_.tail_offset(segment.slot, position, lane);
        row.load_k(0, call_.dim, k + offset);
        row.load_z(0, call_.dim, z + offset);
      }
    }
  }

  using CompressWorker<T>::call_;
  using CompressWorker<T>::pooled_;
  using CompressWorker<T>::fresh_row;
  using CompressWorker<T>::normalise;

  std::vector<WindowRow<T>> rows_;
  std::vector<Channels> weights_, sums_;  // per group of rows
};

}  // namespace dsv4

#endif  // DSV4_COMPRESS_FULL_TAIL_H_
