// compress on the device: loading and pooling eight rows of a window in a thread's registers.
#ifndef DSV4_COMPRESS_DEVICE_CUH_
#define DSV4_COMPRESS_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/op.h"
#include "cuda/ptx.cuh"
#include "cuda/values.cuh"
#include "formats/float_math.h"
#include "formats/fp4.h"

namespace dsv4 {

constexpr int kRows = 8;      // rows a thread pools: a whole CSA window, a sixteenth of an HCA window
constexpr int kChannels = 4;  // neighbouring channels of a thread

struct Four {
  float x[kChannels];
};

__device__ __forceinline__ Four four(float4 v) { return {{v.x, v.y, v.z, v.w}}; }

__device__ __forceinline__ Four load_four(const float* from) { return four(*reinterpret_cast<const float4*>(from)); }

__device__ __forceinline__ Four load_constant(const float* from) {
  return four(__ldg(reinterpret_cast<const float4*>(from)));
}

__device__ __forceinline__ void store_four(float* to, const Four& v) {
  *reinterpret_cast<float4*>(to) = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
}

__device__ __forceinline__ Four add(const Four& a, const Four& b) {
  Four sum;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) sum.x[i] = a.x[i] + b.x[i];
  return sum;
}

// Four values of kv or gate as loaded, so that many loads can be on their way before the first is used.
template <typename T>
using Raw = Values<T, kChannels>;

template <typename T, Load kLoad>
__device__ __forceinline__ Four four(const Values<T, kChannels, kLoad>& raw) {
  return {{raw[0], raw[1], raw[2], raw[3]}};
}
// The words as loaded, in a register array that holds rows of the tail too.
template <typename T>
__device__ __forceinline__ Four bits_of_raw(const Raw<T>& raw) {
  Four bits = {};
#pragma unroll
  for (int i = 0; i < Raw<T>::kWords; ++i) bits.x[i] = float_of(raw.words[i]);
  return bits;
}
template <typename T>
__device__ __forceinline__ Raw<T> raw_of_bits(const Four& bits) {
  Raw<T> raw;
#pragma unroll
  for (int i = 0; i < Raw<T>::kWords; ++i) raw.words[i] = bits_of(bits.x[i]);
  return raw;
}

// An entry of segment s, and thereby a window.
struct WindowOf {
  int64_t s;
  Segment segment;
  int64_t entry;
};

// Four channels of a segment's only token.
struct OwnToken {
  Four k, z;
};

// One lane of a fresh token: four channels of kv, and of gate to which ape is still to be added.
template <typename T>
struct FreshLane {
  Raw<T> kv, gate;

  __device__ __forceinline__ void load(const Compress& call, int64_t token, int lanes, int lane, int64_t dim,
                                       int channel) {
    const int64_t offset = (token * lanes + lane) * dim + channel;
    kv.load(static_cast<const T*>(call.kv) + offset);
    gate.load(static_cast<const T*>(call.gate) + offset);
  }
  __device__ __forceinline__ Four k() const { return four(kv); }
  __device__ __forceinline__ Four z(const Four& ape) const { return add(four(gate), ape); }
};

template <typename Geometry>
__device__ __forceinline__ Four ape_of(const Compress& call, int64_t position, int lane, int channel) {
  const int64_t row = static_cast<uint32_t>(position) % Geometry::kRatio * Geometry::kLanes + lane;
  return load_constant(call.ape + row * Geometry::kDim + channel);
}

// Copies from global to shared memory that need no registers while they are on their way.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  if constexpr (kBytes == 16) {  // past the L1
    ptx::copy_16(ptx::shared_address(to), from);
  } else {
    ptx::copy_small<kBytes>(ptx::shared_address(to), from);
  }
}
__device__ __forceinline__ void wait_for_copies() { ptx::copies_wait_all(); }

// Which rows of a window come from where.
enum class Source {
  kTailAndOwn,  // the last row is the segment's only token, the others lie in the tail
  kTokens,      // all are tokens of the segment
  kMixed,
};

// k and z of eight rows of a window, four channels each. z is in registers; k waits in shared memory, in slots that
// only this thread touches, one block of kBlockThreads after another. Geometry has kRatio, kLanes and kDim.
template <typename T, typename Geometry, int kBlockThreads, Source kSource>
struct EightRows {
  Four z[kRows];
  float4* k;  // this thread's first slot
  uint32_t fresh = 0;
  bool absent = false;  // lane a: there is no window before

  static __device__ __forceinline__ int lane_of(int i) { return Geometry::kLanes == 2 ? i / Geometry::kRatio : 0; }
  __device__ __forceinline__ bool is_absent(int i) const {
    return Geometry::kLanes == 2 && i < Geometry::kRatio && absent;
  }
  __device__ __forceinline__ float4* slot(int i) const { return k + i * kBlockThreads; }

  // Rows `first` to `first` + 7 of an entry's window, counted as in the reference: lane a of the window before comes
  // first where there are two lanes. own: the segment's only token, where there is just one.
  __device__ __forceinline__ void load(const Compress& call, const WindowOf& window, int first, int channel,
                                       const OwnToken& own) {
    const Segment& segment = window.segment;
    const int64_t entry = window.entry;
    absent = Geometry::kLanes == 2 && entry == 0;
    int32_t tokens[kRows];
    if (kSource != Source::kTailAndOwn) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t c = position_of(entry, first, i) - segment.start;
        if (kSource == Source::kTokens || c >= 0) {
          tokens[i] = static_cast<int32_t>(call.token(window.s, c));
          fresh |= 1u << i;
        }
      }
    }
    uint32_t tail_row = 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int lane = lane_of(i);
      const int64_t tail_rows = lane == 0 ? call.rows_a : call.rows_b;
      // One division a lane: the positions follow each other.
      if (i % (Geometry::kLanes == 2 ? Geometry::kRatio : kRows) == 0) {
        tail_row = call.tail_row(position_of(entry, first, i), lane);
      } else if (++tail_row == tail_rows) {
        tail_row = 0;
      }
      if (kSource == Source::kTokens || (kSource == Source::kMixed && (fresh >> i & 1))) {
        const int64_t offset = (static_cast<int64_t>(tokens[i]) * Geometry::kLanes + lane) * Geometry::kDim + channel;
        copy_async<4 * sizeof(T)>(slot(i), static_cast<const T*>(call.kv) + offset);
        Raw<T> gate;
        gate.load(static_cast<const T*>(call.gate) + offset);
        z[i] = bits_of_raw<T>(gate);
      } else if (kSource == Source::kTailAndOwn && i == kRows - 1 &&
                 (Geometry::kLanes == 2 || first == Geometry::kRatio - kRows)) {
        store_four(reinterpret_cast<float*>(slot(i)), own.k);
        z[i] = own.z;
      } else if (!is_absent(i)) {
        const int64_t offset = (segment.slot * tail_rows + tail_row) * Geometry::kDim + channel;
        copy_async<16>(slot(i), (lane == 0 ? call.ka : call.kb) + offset);
        z[i] = load_four((lane == 0 ? call.za : call.zb) + offset);
      }
    }
    if (kSource != Source::kTailAndOwn) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const Four of_row = ape_of<Geometry>(call, Geometry::kLanes == 2 ? i : first + i, lane_of(i), channel);
        if (kSource == Source::kTokens || (fresh >> i & 1)) z[i] = add(four(raw_of_bits<T>(z[i])), of_row);
      }
    }
  }

  __device__ __forceinline__ Four k_of(int i) const {
    if (kSource == Source::kTokens || (kSource == Source::kMixed && (fresh >> i & 1))) {
      Values<T, kChannels, Load::kPlain> raw;
      raw.load(reinterpret_cast<const T*>(slot(i)));
      return four(raw);
    }
    return four(*slot(i));
  }

 private:
  static __device__ __forceinline__ int64_t position_of(int64_t entry, int first, int i) {
    return Geometry::kLanes == 2 ? (entry - 1 + i / Geometry::kRatio) * Geometry::kRatio + i % Geometry::kRatio
                                 : entry * Geometry::kRatio + first + i;
  }
};

template <typename Rows>
__device__ __forceinline__ Four largest(const Rows& rows) {
  Four top = rows.z[kRows - 1];
#pragma unroll
  for (int i = 0; i < kRows - 1; ++i) {
    if (rows.is_absent(i)) continue;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) top.x[c] = larger(top.x[c], rows.z[i].x[c]);
  }
  return top;
}

// Sums over eight rows, in order: of the weights e^(z - top), and of the weighted k.
template <typename Rows>
__device__ __forceinline__ void weigh(const Rows& rows, const Four& top, Four* weights, Four* sums) {
  *weights = *sums = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (rows.is_absent(i)) continue;
    const Four k = rows.k_of(i);
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      const float e = exp_of_negative(rows.z[i].x[c] - top.x[c]);
      weights->x[c] += e;
      sums->x[c] = fused(e, k.x[c], sums->x[c]);
    }
  }
}

// Writes the newest tokens of a segment into one lane of the tail, tokens `first`, `first` + `stride` … of the last
// `rows`; four channels of a token.
template <typename T, typename Geometry>
__device__ __forceinline__ void store_tail_lane(const Compress& call, const WindowOf& window, int lane, int channel,
                                                int first, int stride) {
  const Segment& segment = window.segment;
  const int64_t rows = lane == 0 ? call.rows_a : call.rows_b;
  float *k = lane == 0 ? call.ka : call.kb, *z = lane == 0 ? call.za : call.zb;
  const int64_t oldest = segment.count > rows ? segment.count - rows : 0;
#pragma unroll 4
  for (int64_t c = oldest + first; c < segment.count; c += stride) {
    const int64_t position = segment.start + c;
    FreshLane<T> token;
    token.load(call, call.token(window.s, c), Geometry::kLanes, lane, Geometry::kDim, channel);
    const int64_t offset = call.tail_offset(segment.slot, position, lane) + channel;
    store_four(k + offset, token.k());
    store_four(z + offset, token.z(ape_of<Geometry>(call, position, lane, channel)));
  }
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_DEVICE_CUH_
