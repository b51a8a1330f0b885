// compress on the CPU with a running tail: every token enters the sums of its window.
#ifndef DSV4_COMPRESS_RUNNING_TAIL_H_
#define DSV4_COMPRESS_RUNNING_TAIL_H_

#include <algorithm>

#include "compress/worker.h"
#include "math/running_sums.h"

namespace dsv4 {

// The sums of kChannels channels, one array for each of RunningSums' members.
using SumsOfChannels = std::array<Channels, kRunningSums>;

inline RunningSums sums_of(const SumsOfChannels& sums, size_t i) {
  return {sums[0][i], sums[1][i], sums[2][i], sums[3][i], sums[4][i]};
}

inline void set_sums(const RunningSums& one, size_t i, SumsOfChannels* sums) {
  (*sums)[0][i] = one.top, (*sums)[1][i] = one.sum, (*sums)[2][i] = one.weighted;
  (*sums)[3][i] = one.sum_lost, (*sums)[4][i] = one.weighted_lost;
}

DSV4_VECTOR_CLONES inline void enter(const Channels& k, const Channels& z, bool is_first, SumsOfChannels* sums) {
  for (size_t i = 0; i < k.size(); ++i) {
    set_sums(is_first ? RunningSums::of_token(k[i], z[i]) : sums_of(*sums, i).with_token(k[i], z[i]), i, sums);
  }
}

template <typename T>
class RunningTailWorker : CompressWorker<T> {
 public:
  explicit RunningTailWorker(const Compress& call) : CompressWorker<T>(call) {}

  // The k-th share of segment s; write(row, values) stores an entry. The first share has the first window, which may
  // begin in the tail, and then writes the tail.
  template <typename Write>
  void run(int64_t s, int64_t k, const Write& write) {
    const Segment segment = call_.segment(s);
    if (segment.count == 0) return;
    const int64_t first_entry = call_.first_entry(segment), entry = first_entry + k;
    const int64_t first_kept = std::max(segment.start, segment.end() - call_.rows_a);
    const bool closes = call_.closes(segment, entry);
    const int64_t row = closes ? call_.entry_row(segment.slot, entry) : -1;
    if (row >= 0 || k == 0) take_window(s, segment, entry, k == 0 ? first_kept : segment.end());
    if (row >= 0) {
      normalise(s, k);
      write(row, pooled_.data());
    }
    if (k > 0) return;
    const int64_t first = std::max(first_entry + 1, first_kept / call_.ratio);
    for (int64_t e = first; e * call_.ratio < segment.end(); ++e) take_window(s, segment, e, first_kept);
  }

 private:
  // The segment's tokens of a window into its sums, and their mean into pooled_; stores the sums after tokens from
  // position `first_kept` on.
  void take_window(int64_t s, const Segment& segment, int64_t entry, int64_t first_kept) {
    const int64_t begin = std::max(segment.start, entry * call_.ratio);
    const int64_t end = std::min(segment.end(), (entry + 1) * call_.ratio);
    for (int64_t channel = 0; channel < call_.dim; channel += kChannels) {
      const int64_t n = std::min(kChannels, call_.dim - channel);
      SumsOfChannels sums{};
      Channels k{}, z{};
      if (begin % call_.ratio) {
        for (int64_t i = 0; i < kRunningSums; ++i) {
          std::copy_n(sums_at(segment.slot, begin - 1, i) + channel, n, sums[i].begin());
        }
      }
      for (int64_t position = begin; position < end; ++position) {
        const WindowRow<T> row = fresh_row(s, segment, position, 0);
        row.load_k(channel, n, k.data());
        row.load_z(channel, n, z.data());
        enter(k, z, position % call_.ratio == 0, &sums);
        if (position < first_kept || (position + 1) % call_.ratio == 0) continue;
        for (int64_t i = 0; i < kRunningSums; ++i) {
          std::copy_n(sums[i].begin(), n, sums_at(segment.slot, position, i) + channel);
        }
      }
      for (int64_t i = 0; i < n; ++i) pooled_[channel + i] = sums_of(sums, i).mean();
    }
  }

  float* sums_at(int64_t slot, int64_t position, int64_t i) const {
    return call_.sums + kRunningSums * call_.tail_offset(slot, position, 0) + i * call_.dim;
  }

  using CompressWorker<T>::call_;
  using CompressWorker<T>::pooled_;
  using CompressWorker<T>::fresh_row;
  using CompressWorker<T>::normalise;
};

}  // namespace dsv4

#endif  // DSV4_COMPRESS_RUNNING_TAIL_H_
