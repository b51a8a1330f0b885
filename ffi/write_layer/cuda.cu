// write_layer on the GPU: one launch, in which different blocks do the parts. Those with most to do start first.
#include "append_swa/device.cuh"
#include "common/export.h"
#include "common/launched.h"
#include "compress/decode.cuh"
#include "compress/finish.cuh"
#include "compress/hca.cuh"
#include "compress/running.cuh"
#include "compress/supported.h"
#include "write_layer/op.h"

namespace dsv4 {
namespace {

using FinishEntry = FinishRecordInBlock<V4Record>;
using FinishKeys = FinishKeyOfPairs<V4Key>;

constexpr int kThreads = FinishEntry::kThreads, kWarps = kThreads / 32;
constexpr int kKeysPerBlock = kThreads / FinishKeys::kThreads;

constexpr int64_t blocks_of(int64_t workers, int64_t per_block) { return (workers + per_block - 1) / per_block; }

// A warp's token, of blocks that have kWarps each.
template <typename T, int kWarps>
__device__ __forceinline__ void append_in_block(const AppendSwa& call, uint32_t block) {
  const int64_t token = static_cast<int64_t>(block) * kWarps + threadIdx.x / 32;
  if (call.record.scales) {
    append_token<V4Record, T, true, true>(call, token, threadIdx.x % 32);
  } else {
    append_token<V4Record, T, true, false>(call, token, threadIdx.x % 32);
  }
}

// A block for every segment's entry, then for every few segments' keys, then a warp for every window row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    csa_layer_kernel(const __grid_constant__ WriteLayer call, const uint32_t key_blocks, const uint32_t entry_blocks) {
  __shared__ union {
    FinishEntry::Scratch entry;
    FinishKeys::Scratch keys[kKeysPerBlock];
  } scratch;
  const uint32_t block = blockIdx.x;
  if (block < entry_blocks) {
    take_token<T, Csa>(call.entries, FinishEntry{call.record}, block, threadIdx.x, &scratch.entry);
  } else if (block < entry_blocks + key_blocks) {
    const uint32_t group = threadIdx.x / FinishKeys::kThreads, s = (block - entry_blocks) * kKeysPerBlock + group;
    if (s >= call.keys.segments) return;
    take_token<T, CsaIndexer>(call.keys, FinishKeys{{call.key_rows}}, s, threadIdx.x % FinishKeys::kThreads,
                              &scratch.keys[group]);
  } else {
    append_in_block<T, kWarps>(call.window, block - entry_blocks - key_blocks);
  }
}

// The blocks of the windows, in clusters where there are clusters, then a warp for every window row.
template <typename T, bool kCluster>
__global__ void __launch_bounds__(kHcaThreads, kCluster ? 4 : 2)
    hca_layer_kernel(const __grid_constant__ WriteLayer call, const uint32_t window_blocks) {
  extern __shared__ float4 dynamic[];
  if (blockIdx.x < window_blocks) {
    take_slices<T, Hca, true, kCluster>(call.entries, call.record, 1, reinterpret_cast<HcaScratch<Hca>*>(dynamic));
  } else {
    append_in_block<T, kHcaWarps>(call.window, blockIdx.x - window_blocks);
  }
}

// A block for every segment's token, then a warp for every window row.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    running_layer_kernel(const __grid_constant__ WriteLayer call, const uint32_t token_blocks) {
  __shared__ FinishEntry::Scratch scratch;
  if (blockIdx.x < token_blocks) {
    take_running_token<T, Hca>(call.entries, FinishEntry{call.record}, blockIdx.x, &scratch);
  } else {
    append_in_block<T, kWarps>(call.window, blockIdx.x - token_blocks);
  }
}

template <typename T>
cudaError_t launch(const WriteLayer& call, cudaStream_t stream) {
  const auto entry_blocks = static_cast<uint32_t>(call.entries.segments);
  const auto row_blocks = static_cast<uint32_t>(blocks_of(call.window.tokens, kWarps));
  if (call.entries.sums) {
    running_layer_kernel<T><<<entry_blocks + row_blocks, kThreads, 0, stream>>>(call, entry_blocks);
    return cudaGetLastError();
  }
  if (is<Hca>(call.entries)) {
    const SlicesLaunch<Hca> launch(stream, call.entries.segments, blocks_of(call.window.tokens, kHcaWarps));
    const auto kernel = launch.has_clusters ? hca_layer_kernel<T, true> : hca_layer_kernel<T, false>;
    return cudaLaunchKernelEx(&launch.config, kernel, call, launch.window_blocks);
  }
  const auto key_blocks = static_cast<uint32_t>(blocks_of(call.keys.segments, kKeysPerBlock));
  csa_layer_kernel<T><<<entry_blocks + key_blocks + row_blocks, kThreads, 0, stream>>>(call, key_blocks, entry_blocks);
  return cudaGetLastError();
}

ffi::Error write_layer(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                       float eps, int64_t of_entries) {
  WriteLayer call;
  if (const ffi::Error error = bind_write_layer(args, results, layer, eps, of_entries, &call); error.failure())
    return error;
  ffi::Error limit = supported_window<V4Record>("write_layer", call.window);
  if (limit.success()) limit = supported_entries("write_layer", call.entries, call.record);
  if (limit.success() && call.keys.segments) limit = supported_keys("write_layer", call.keys);
  if (limit.success() && call.keys.segments && is<Hca>(call.entries)) {
    limit = ffi::Error::InvalidArgument("write_layer: got indexer keys with windows of 128; expected windows of 4.");
  }
  if (limit.failure() || call.window.tokens == 0) return limit;
  return launched("write_layer",
                  call.window.kv_is_float ? launch<float>(call, stream) : launch<BFloat16>(call, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4WriteLayer, dsv4::write_layer,
                  .Attr<int64_t>("layer").Attr<float>("eps").Attr<int64_t>("of_entries"));
