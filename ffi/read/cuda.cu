// read_window, read_entries and read_keys on the GPU: one warp a vector, or four where there are many.
#include <cuda_runtime.h>

#include "common/export.h"
#include "cuda/ptx.cuh"
#include "formats/dequantise.h"
#include "read/op.h"

namespace dsv4 {
namespace {

constexpr int kNopeWidth = 448, kRopeWidth = 64, kWidth = kNopeWidth + kRopeWidth, kKeyDim = 128;
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int64_t kFewVectors = 8192;  // up to here a warp each fills the chip no more than once

// Four E4M3 codes, the first in the low byte, as floats.
__device__ __forceinline__ void decode_four(uint32_t codes, float (&x)[4]) {
#if __CUDA_ARCH__ >= 890
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t halves = ptx::halves_of_e4m3(codes >> (16 * i));  // every E4M3 value is one of half precision too
    asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
        : "=f"(x[2 * i]), "=f"(x[2 * i + 1])
        : "r"(halves));
  }
#else
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = e4m3_value(codes >> (8 * i));
#endif
}

__device__ __forceinline__ uint4 words_of(const float (&x)[4]) {
  return make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3]));
}

// What a lane loads of a vector and the 16 bytes it makes of that: eight values of bfloat16, or four of float.
template <typename Out>
struct Part;

template <>
struct Part<BFloat16> {
  uint4 raw;

  __device__ __forceinline__ void load_codes(const uint8_t* from) {
    const uint2 codes = __ldg(reinterpret_cast<const uint2*>(from));
    raw = make_uint4(codes.x, codes.y, 0, 0);
  }
  __device__ __forceinline__ void load_rope(const BFloat16* from) { raw = __ldg(reinterpret_cast<const uint4*>(from)); }
  __device__ __forceinline__ uint4 decode_codes(float scale) const {
    float a[4], b[4];
    decode_four(raw.x, a);
    decode_four(raw.y, b);
    return make_uint4(ptx::bfloat_pair(a[0] * scale, a[1] * scale), ptx::bfloat_pair(a[2] * scale, a[3] * scale),
                      ptx::bfloat_pair(b[0] * scale, b[1] * scale), ptx::bfloat_pair(b[2] * scale, b[3] * scale));
  }
  __device__ __forceinline__ uint4 decode_rope() const { return raw; }
};

template <>
struct Part<float> {
  uint2 raw;

  __device__ __forceinline__ void load_codes(const uint8_t* from) {
    raw.x = __ldg(reinterpret_cast<const uint32_t*>(from));
  }
  __device__ __forceinline__ void load_rope(const BFloat16* from) { raw = __ldg(reinterpret_cast<const uint2*>(from)); }
  __device__ __forceinline__ uint4 decode_codes(float scale) const {
    float x[4];
    decode_four(raw.x, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] *= scale;
    return words_of(x);
  }
  __device__ __forceinline__ uint4 decode_rope() const {
    return make_uint4(raw.x << 16, raw.x & 0xFFFF0000u, raw.y << 16, raw.y & 0xFFFF0000u);
  }
};

// The scale that belongs to value `at` of a row.
template <typename Scale>
__device__ __forceinline__ Scale load_scale(const ReadRecords& call, int64_t row, int at) {
  if constexpr (sizeof(Scale) == 1) {
    return __ldg(static_cast<const uint8_t*>(call.scale) + row * call.scale_width + at / 64);
  } else {
    return __ldg(static_cast<const float*>(call.scale) + row);
  }
}

__device__ __forceinline__ float scale_value(float scale) { return scale; }
__device__ __forceinline__ float scale_value(uint8_t scale) { return e8m0_value(scale); }

// One vector in a warp: loaded first, written when the loads of all of the warp's vectors are under way.
template <typename Scale, typename Out>
struct RecordInWarp {
  static constexpr int kValues = 16 / sizeof(Out), kParts = kWidth / (32 * kValues);
  Part<Out> parts[kParts];
  Scale scales[sizeof(Scale) == 1 ? kParts : 1];

  __device__ __forceinline__ static int first_value(int part, int lane) { return (part * 32 + lane) * kValues; }

  __device__ __forceinline__ void load(const ReadRecords& call, int64_t row, int lane) {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int at = first_value(p, lane);
      if (at < kNopeWidth) {
        parts[p].load_codes(call.nope + row * kNopeWidth + at);
        if (sizeof(Scale) == 1 || p == 0) scales[sizeof(Scale) == 1 ? p : 0] = load_scale<Scale>(call, row, at);
      } else {
        parts[p].load_rope(call.rope + row * kRopeWidth + (at - kNopeWidth));
      }
    }
  }
  __device__ __forceinline__ void store(const ReadRecords& call, int64_t vector, int lane, bool exists) const {
#pragma unroll
    for (int p = 0; p < kParts; ++p) {
      const int at = first_value(p, lane);
      uint4 words = make_uint4(0, 0, 0, 0);
      if (exists) {
        words = at < kNopeWidth ? parts[p].decode_codes(scale_value(scales[sizeof(Scale) == 1 ? p : 0]))
                                : parts[p].decode_rope();
      }
      *reinterpret_cast<uint4*>(static_cast<Out*>(call.out) + vector * kWidth + at) = words;
    }
  }
};

// An FP4 key in a warp, four values a lane.
template <int kGroup>
struct KeyInWarp {
  uint16_t codes;
  uint8_t scale;

  __device__ __forceinline__ void load(const ReadKeys& call, int64_t row, int lane) {
    codes = __ldg(reinterpret_cast<const uint16_t*>(call.keys + row * (kKeyDim / 2)) + lane);
    scale = __ldg(call.scale + row * (kKeyDim / kGroup) + lane * 4 / kGroup);
  }
  __device__ __forceinline__ void store(const ReadKeys& call, int64_t vector, int lane, bool exists) const {
    float x[4] = {};
    const float value = kGroup == 16 ? e4m3_value(scale) : e8m0_value(scale);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = exists ? e2m1_value(static_cast<uint32_t>(codes) >> (4 * i)) * value : 0.0f;
    *reinterpret_cast<uint4*>(call.out + vector * kKeyDim + lane * 4) = words_of(x);
  }
};

// `parts` blocks read the vectors of a request, kInFlight in every warp.
template <typename InWarp, int kInFlight, typename Call, typename Rows>
__global__ void __launch_bounds__(kThreads) read_kernel(const Call call, const Rows rows, unsigned parts) {
  const int lane = threadIdx.x % 32;
  const unsigned request = blockIdx.x / parts;
  const int64_t first = (static_cast<int64_t>(blockIdx.x - request * parts) * kWarps + threadIdx.x / 32) * kInFlight;
  // The rows are found by a lane each.
  int64_t found = -1;
  if (lane < kInFlight && first + lane < call.per_request) found = rows.row(request, first + lane);
  InWarp vectors[kInFlight];
  bool exists[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    const int64_t row = __shfl_sync(0xFFFFFFFFu, found, i);
    exists[i] = row >= 0;
    if (exists[i]) vectors[i].load(call, row, lane);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i < call.per_request) {
      vectors[i].store(call, static_cast<int64_t>(request) * call.per_request + first + i, lane, exists[i]);
    }
  }
}

template <typename InWarp, int kInFlight, typename Call, typename Rows>
ffi::Error launch(cudaStream_t stream, const Call& call, const Rows& rows) {
  // The grid depends on shapes alone: a CUDA graph may replay it.
  const int64_t parts = (call.per_request + kWarps * kInFlight - 1) / (kWarps * kInFlight);
  if (call.requests * parts > INT32_MAX) {
    return ffi::Error::InvalidArgument("read: got " + std::to_string(call.vectors()) +
                                       " vectors; expected some 2^33 at most in one call.");
  }
  read_kernel<InWarp, kInFlight><<<static_cast<unsigned>(call.requests * parts), kThreads, 0, stream>>>(
      call, rows, static_cast<unsigned>(parts));
  const cudaError_t status = cudaGetLastError();
  if (status == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("read: the kernel was not launched: ") + cudaGetErrorString(status));
}

template <typename InWarp, typename Call, typename Rows>
ffi::Error read_all(cudaStream_t stream, const Call& call, const Rows& rows) {
  if (call.vectors() == 0) return ffi::Error::Success();
  return call.vectors() <= kFewVectors ? launch<InWarp, 1>(stream, call, rows) : launch<InWarp, 4>(stream, call, rows);
}

template <typename Rows>
ffi::Error read_records(cudaStream_t stream, const ReadRecords& call, const Rows& rows) {
  if (call.nope_width != kNopeWidth || call.rope_width != kRopeWidth) {
    return ffi::Error::InvalidArgument("read: got records of " + std::to_string(call.nope_width) + " + " +
                                       std::to_string(call.rope_width) + " values; expected 448 + 64 on CUDA.");
  }
  if (call.scale_width != 0 && call.scale_width != 8) {
    return ffi::Error::InvalidArgument("read: got " + std::to_string(call.scale_width) +
                                       " scales a record; expected 8 on CUDA.");
  }
  if (call.scale_width == 0) {
    return call.out_is_float ? read_all<RecordInWarp<float, float>>(stream, call, rows)
                             : read_all<RecordInWarp<float, BFloat16>>(stream, call, rows);
  }
  return call.out_is_float ? read_all<RecordInWarp<uint8_t, float>>(stream, call, rows)
                           : read_all<RecordInWarp<uint8_t, BFloat16>>(stream, call, rows);
}

ffi::Error read_window(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                       int64_t window) {
  ReadRecords call;
  WindowRows rows;
  const ffi::Error error = bind_read_window(args, results, layer, window, &call, &rows);
  return error.success() ? read_records(stream, call, rows) : error;
}

ffi::Error read_entries(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadRecords call;
  EntryRows rows;
  const ffi::Error error = bind_read_entries(args, results, layer, &call, &rows);
  return error.success() ? read_records(stream, call, rows) : error;
}

ffi::Error read_keys(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadKeys call;
  EntryRows rows;
  const ffi::Error error = bind_read_keys(args, results, layer, &call, &rows);
  if (error.failure()) return error;
  if (call.dim != kKeyDim) {
    return ffi::Error::InvalidArgument("read_keys: got keys of " + std::to_string(call.dim) +
                                       " values; expected 128 on CUDA.");
  }
  return call.group == 16 ? read_all<KeyInWarp<16>>(stream, call, rows) : read_all<KeyInWarp<32>>(stream, call, rows);
}

}  // namespace
}  // namespace dsv4

#define DSV4_DEFINE_READ(symbol, function, ...)                               \
  DSV4_EXPORT_HANDLER(symbol);                                                \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(symbol, function,                             \
                                xla::ffi::Ffi::Bind()                         \
                                    .Ctx<xla::ffi::PlatformStream<cudaStream_t>>() \
                                    .RemainingArgs()                          \
                                    .RemainingRets()                          \
                                    .Attr<int64_t>("layer") __VA_ARGS__,      \
                                {xla::ffi::Traits::kCmdBufferCompatible})

DSV4_DEFINE_READ(Dsv4ReadWindow, dsv4::read_window, .Attr<int64_t>("window"));
DSV4_DEFINE_READ(Dsv4ReadEntries, dsv4::read_entries, );
DSV4_DEFINE_READ(Dsv4ReadKeys, dsv4::read_keys, );
