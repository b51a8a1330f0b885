// What the workers of compress on the CPU share: the rows of a window, and finishing an entry.
#ifndef DSV4_COMPRESS_WORKER_H_
#define DSV4_COMPRESS_WORKER_H_

#include <array>
#include <cstdint>
#include <vector>

#include "common/vector_clones.h"
#include "compress/op.h"
#include "math/rms_norm_rope.h"

namespace dsv4 {

constexpr int64_t kChannels = 64;  // channels pooled at a time

struct Channels : std::array<float, kChannels> {};

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
class CompressWorker {
 protected:
  explicit CompressWorker(const Compress& call) : call_(call), pooled_(call.dim) {}

  WindowRow<T> fresh_row(int64_t s, const Segment& segment, int64_t position, int64_t lane) const {
    const int64_t offset = call_.token(s, position - segment.start) * call_.lanes * call_.dim + lane * call_.dim;
    return {static_cast<const T*>(call_.kv) + offset, static_cast<const T*>(call_.gate) + offset, nullptr,
            call_.ape + (position % call_.ratio * call_.lanes + lane) * call_.dim};
  }

  // RMSNorm, and RoPE at the first position of the window.
  void normalise(int64_t s, int64_t window) {
    const int64_t pair = (s * call_.windows + window) * (call_.rope_dim / 2);
    rms_norm_rope_(pooled_.data(), call_.dim, call_.rope_dim, call_.norm, call_.cos + pair, call_.sin + pair,
                   call_.eps);
  }

  const Compress& call_;
  std::vector<float> pooled_;  // an entry

 private:
  RmsNormRope rms_norm_rope_;
};

}  // namespace dsv4

#endif  // DSV4_COMPRESS_WORKER_H_
