// compress on the device: loading and pooling eight rows of a window in a thread's registers, and finishing an entry.
#ifndef DSV4_COMPRESS_DEVICE_CUH_
#define DSV4_COMPRESS_DEVICE_CUH_

#include <cuda_runtime.h>

#include <cstdint>

#include "compress/op.h"
#include "cuda/ptx.cuh"
#include "cuda/quantise_warp.cuh"
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

// Four values as loaded, so that many loads can be on their way before the first is used: of kv or gate, or of the tail.
template <typename T>
struct Raw;

template <>
struct Raw<float> {
  float4 v;
  __device__ __forceinline__ void load(const void* base, int64_t offset) {
    v = __ldcs(reinterpret_cast<const float4*>(static_cast<const float*>(base) + offset));
  }
  __device__ __forceinline__ Four fresh() const { return four(v); }
  // The bits as loaded, in a register array that holds rows of the tail too.
  __device__ __forceinline__ Four bits() const { return four(v); }
  static __device__ __forceinline__ Raw of_bits(const Four& f) { return {make_float4(f.x[0], f.x[1], f.x[2], f.x[3])}; }
};

template <>
struct Raw<BFloat16> {
  uint2 v;
  __device__ __forceinline__ void load(const void* base, int64_t offset) {
    v = __ldcs(reinterpret_cast<const uint2*>(static_cast<const BFloat16*>(base) + offset));
  }
  __device__ __forceinline__ Four fresh() const {
    return {{float_of(v.x << 16), float_of(v.x & 0xFFFF0000u), float_of(v.y << 16), float_of(v.y & 0xFFFF0000u)}};
  }
  __device__ __forceinline__ Four bits() const { return {{float_of(v.x), float_of(v.y), 0.0f, 0.0f}}; }
  static __device__ __forceinline__ Raw of_bits(const Four& f) { return {make_uint2(bits_of(f.x[0]), bits_of(f.x[1]))}; }
};

// One lane of a fresh token: four channels of kv, and of gate to which ape is still to be added.
template <typename T>
struct FreshLane {
  Raw<T> kv, gate;

  __device__ __forceinline__ void load(const Compress& call, int64_t token, int lanes, int lane, int64_t dim, int channel) {
    const int64_t offset = (token * lanes + lane) * dim + channel;
    kv.load(call.kv, offset);
    gate.load(call.gate, offset);
  }
  __device__ __forceinline__ Four k() const { return kv.fresh(); }
  __device__ __forceinline__ Four z(const Four& ape) const { return add(gate.fresh(), ape); }
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

// k and z of eight rows of a window, four channels each. z is in registers; k waits in shared memory, in slots that only
// this thread touches, one block of kBlockThreads after another. Geometry has kRatio, kLanes and kDim.
template <typename T, typename Geometry, int kBlockThreads, Source kSource>
struct EightRows {
  Four z[kRows];
  float4* k;  // this thread's first slot
  uint32_t fresh = 0;
  bool absent = false;  // lane a: there is no window before

  static __device__ __forceinline__ int lane_of(int i) { return Geometry::kLanes == 2 ? i / Geometry::kRatio : 0; }
  __device__ __forceinline__ bool is_absent(int i) const { return Geometry::kLanes == 2 && i < Geometry::kRatio && absent; }
  __device__ __forceinline__ float4* slot(int i) const { return k + i * kBlockThreads; }

  // Rows `first` to `first` + 7 of an entry's window, counted as in the reference: lane a of the window before comes
  // first where there are two lanes. own_k and own_z: the segment's only token, where there is just one.
  __device__ __forceinline__ void load(const Compress& call, int64_t s, const Segment& segment, int64_t entry, int first,
                                       int channel, const Four& own_k, const Four& own_z) {
    absent = Geometry::kLanes == 2 && entry == 0;
    int32_t tokens[kRows];
    if (kSource != Source::kTailAndOwn) {
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const int64_t c = position_of(entry, first, i) - segment.start;
        if (kSource == Source::kTokens || c >= 0) {
          tokens[i] = static_cast<int32_t>(call.token(s, c));
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
        gate.load(call.gate, offset);
        z[i] = gate.bits();
      } else if (kSource == Source::kTailAndOwn && i == kRows - 1 &&
                 (Geometry::kLanes == 2 || first == Geometry::kRatio - kRows)) {
        store_four(reinterpret_cast<float*>(slot(i)), own_k);
        z[i] = own_z;
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
        if (kSource == Source::kTokens || (fresh >> i & 1)) z[i] = add(Raw<T>::of_bits(z[i]).fresh(), of_row);
      }
    }
  }

  __device__ __forceinline__ Four k_of(int i) const {
    if (kSource == Source::kTokens || (kSource == Source::kMixed && (fresh >> i & 1))) {
      Raw<T> raw;
      raw.v = *reinterpret_cast<const decltype(raw.v)*>(slot(i));
      return raw.fresh();
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

// A barrier of a block's group-th kThreads threads (one warp needs none: it is converged).
template <int kThreads>
__device__ __forceinline__ void sync_group(int group) {
  if (kThreads == 32) {
    __syncwarp();
  } else {
    ptx::sync_threads(group + 1, kThreads);
  }
}

// Memory that the threads which finish an entry share.
template <int kWarps>
struct FinishScratch {
  float squares[kWarps];
  uint32_t amax[kWarps];
};

// What finishing an entry needs besides its values, fetched before it is needed.
struct EntryConstants {
  Four weight;
  float2 cos, sin;

  template <int kDim, int kRopeDim>
  __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread) {
    const int channel = thread * kChannels;
    weight = load_constant(call.norm + channel);
    if (channel < kDim - kRopeDim) return;
    const int64_t pair = window * (kRopeDim / 2) + (channel - (kDim - kRopeDim)) / 2;
    cos = __ldg(reinterpret_cast<const float2*>(call.cos + pair));
    sin = __ldg(reinterpret_cast<const float2*>(call.sin + pair));
  }
};

// RMSNorm and RoPE of an entry of kDim channels, four in each of kDim / 4 threads, which all call together.
template <int kDim, int kRopeDim>
__device__ __forceinline__ void normalise(const Compress& call, const EntryConstants& constants, int thread, Four* v,
                                          FinishScratch<kDim / 128>* scratch) {
  constexpr int kThreads = kDim / kChannels, kWarps = kThreads / 32, kNopeDim = kDim - kRopeDim;
  const int channel = thread * kChannels;
  float squares = quad_of_squares(v->x[0], v->x[1], v->x[2], v->x[3]);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
  if (kWarps > 1) {
    if (thread % 32 == 0) scratch->squares[thread / 32] = squares;
    sync_group<kThreads>(0);
    static_assert(kWarps == 1 || kWarps == 4, "the tree over warps");
    squares = (scratch->squares[0] + scratch->squares[1 % kWarps]) +
              (scratch->squares[2 % kWarps] + scratch->squares[3 % kWarps]);
  }
  const float scale = inverse_sqrt(squares * (1.0f / kDim) + call.eps);
#pragma unroll
  for (int c = 0; c < kChannels; ++c) v->x[c] = v->x[c] * scale * constants.weight.x[c];
  if (channel >= kNopeDim) {
    const float cosines[2] = {constants.cos.x, constants.cos.y}, sines[2] = {constants.sin.x, constants.sin.y};
#pragma unroll
    for (int p = 0; p < 2; ++p) {
      const float even = v->x[2 * p], odd = v->x[2 * p + 1];
      v->x[2 * p] = even * cosines[p] - odd * sines[p];
      v->x[2 * p + 1] = even * sines[p] + odd * cosines[p];
    }
  }
}

__device__ __forceinline__ uint32_t largest_magnitude(const Four& v) {
  return max(max(magnitude_bits(v.x[0]), magnitude_bits(v.x[1])), max(magnitude_bits(v.x[2]), magnitude_bits(v.x[3])));
}

// Writes an entry as an FP8 record: 448 + 64 channels in 128 threads, which all call together.
__device__ __forceinline__ void write_record(const RecordRows& record, int64_t row, int thread, const Four& v,
                                             FinishScratch<4>* scratch) {
  constexpr int kNopeDim = 448, kRopeDim = 64;
  const int channel = thread * kChannels;
  const bool is_rope = channel >= kNopeDim;
  const uint32_t amax = is_rope ? 0u : largest_magnitude(v);
  uint32_t codes;
  if (record.scales) {
    const GroupEncoder<16> encoder(amax);
    codes = encoder.encode(v.x[0], v.x[1], v.x[2], v.x[3]);
    if (thread % 16 == 0) record.scales[row * 8 + thread / 16] = is_rope ? 0 : encoder.scale();  // the last is padding
  } else {
    const uint32_t in_warp = __reduce_max_sync(0xFFFFFFFFu, amax);
    if (thread % 32 == 0) scratch->amax[thread / 32] = in_warp;
    sync_group<128>(0);
    const RowEncoder encoder(
        max(max(scratch->amax[0], scratch->amax[1]), max(scratch->amax[2], scratch->amax[3])));
    codes = encoder.encode(v.x[0], v.x[1], v.x[2], v.x[3]);
    if (thread == 0) record.inv_scale[row] = encoder.inv_scale();
  }
  if (is_rope) {
    const uint2 words = make_uint2(to_bf16(v.x[0]).bits | (static_cast<uint32_t>(to_bf16(v.x[1]).bits) << 16),
                                   to_bf16(v.x[2]).bits | (static_cast<uint32_t>(to_bf16(v.x[3]).bits) << 16));
    *reinterpret_cast<uint2*>(record.rope + row * kRopeDim + (channel - kNopeDim)) = words;
  } else {
    *reinterpret_cast<uint32_t*>(record.nope + row * kNopeDim + channel) = codes;
  }
}

// Rotates 128 channels, four in each lane of a warp, by the orthonormal Hadamard matrix in natural order.
__device__ __forceinline__ void rotate_warp(Four* v, int lane) {
  const float a = v->x[0] + v->x[1], b = v->x[0] - v->x[1], c = v->x[2] + v->x[3], d = v->x[2] - v->x[3];
  *v = {{a + c, b + d, a - c, b - d}};
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
#pragma unroll
    for (int i = 0; i < kChannels; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, v->x[i], step);
      v->x[i] = lane & step ? other - v->x[i] : v->x[i] + other;
    }
  }
  constexpr float kScale = 0x1.6a09e6p-4f;  // 1 / sqrt(128)
#pragma unroll
  for (int i = 0; i < kChannels; ++i) v->x[i] *= kScale;
}

// Writes an indexer key in FP4: 128 channels in a warp.
__device__ __forceinline__ void write_key(const KeyRows& keys, int64_t row, int lane, Four v) {
  constexpr int kDim = 128;
  if (keys.rotate) rotate_warp(&v, lane);
  const bool is_nvfp4 = keys.group == 16;
  const int lanes_a_group = is_nvfp4 ? 4 : 8;
  uint32_t amax = largest_magnitude(v);
  amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
  amax = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 2));
  const uint32_t wider = max(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 4));
  if (!is_nvfp4) amax = wider;
  const GroupScale scale(amax, is_nvfp4);
  uint32_t codes = 0;
#pragma unroll
  for (int i = 0; i < kChannels; ++i) codes |= scale.encode(v.x[i]) << (4 * i);
  *reinterpret_cast<uint16_t*>(keys.keys + row * (kDim / 2) + lane * 2) = static_cast<uint16_t>(codes);
  if (lane % lanes_a_group == 0) keys.scale[row * (32 / lanes_a_group) + lane / lanes_a_group] = scale.byte;
}

// Writes the newest tokens of a segment into one lane of the tail, tokens `first`, `first` + `stride` … of the last
// `rows`; four channels of a token.
template <typename T, typename Geometry>
__device__ __forceinline__ void store_tail_lane(const Compress& call, int64_t s, const Segment& segment, int lane,
                                                int channel, int first, int stride) {
  const int64_t rows = lane == 0 ? call.rows_a : call.rows_b;
  float *k = lane == 0 ? call.ka : call.kb, *z = lane == 0 ? call.za : call.zb;
  const int64_t oldest = segment.count > rows ? segment.count - rows : 0;
#pragma unroll 4
  for (int64_t c = oldest + first; c < segment.count; c += stride) {
    const int64_t position = segment.start + c;
    FreshLane<T> token;
    token.load(call, call.token(s, c), Geometry::kLanes, lane, Geometry::kDim, channel);
    const int64_t offset = call.tail_offset(segment.slot, position, lane) + channel;
    store_four(k + offset, token.k());
    store_four(z + offset, token.z(ape_of<Geometry>(call, position, lane, channel)));
  }
}

}  // namespace dsv4

#endif  // DSV4_COMPRESS_DEVICE_CUH_
