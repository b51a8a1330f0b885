// attend on the GPU: compute capability 9.0.
#include <cuda_runtime.h>

#include "attend/few_tokens.cuh"
#include "attend/op.h"
#include "attend/sm90.cuh"
#include "attend/window.cuh"
#include "common/export.h"
#include "common/launched.h"

namespace dsv4 {
namespace {

constexpr int kMostSplits = 16;  // thread blocks of a cluster

// Clusters of so many thread blocks that run at once on an H200, as cudaOccupancyMaxActiveClusters says of it: a
// cluster lies in one of the chip's eight parts. One cluster more than that takes twice as long.
constexpr int kClusters[kMostSplits + 1] = {0, 132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7};

constexpr int64_t kRows = 64;  // of a block of rows
static_assert(kRows == attend_sm90::kRows && kRows == attend_few::kRows, "kernels of other blocks of rows");

// Blocks of rows of a token at most.
int64_t blocks_of(const AttendCall& call) {
  const int64_t entries = !call.has_entries ? 0 : call.selected ? call.chosen : call.max_entries;
  return (call.window + kRows - 1) / kRows + (entries + kRows - 1) / kRows;
}

// In how many parts the rows of a token are taken: from shapes alone, so that a token's bits follow from them too. As
// few as give the parts the fewest blocks of rows, of those of which all clusters run at once.
int splits_of(int64_t blocks, int64_t clusters) {
  int best = 1;
  for (int splits = 2; splits <= kMostSplits; ++splits) {
    const bool together = clusters <= kClusters[splits];
    if (together && (blocks + splits - 1) / splits < (blocks + best - 1) / best) best = splits;
  }
  return best;
}

int64_t clusters_of(const AttendCall& call, int64_t heads) { return call.tokens * ((call.heads + heads - 1) / heads); }

int splits_for_few(const AttendCall& call) { return splits_of(blocks_of(call), clusters_of(call, attend_few::kHeads)); }

// Whether the kernel of few tokens is the faster one (docs/measurements): where its thread blocks have few blocks of
// rows.
bool is_for_few(const AttendCall& call) {
  constexpr int64_t kMostTokens = 16, kFewClusters = 8;
  const int64_t clusters = clusters_of(call, attend_few::kHeads), blocks = blocks_of(call);
  const int64_t most = clusters <= kFewClusters ? 10 : 5;
  return call.tokens <= kMostTokens && blocks <= most * splits_for_few(call);
}

// Whether its warps hold the queries in registers, which pays from two blocks of rows on.
bool is_held(const AttendCall& call) { return blocks_of(call) > splits_for_few(call); }

// Launches `splits` thread blocks, as a cluster or not, that share the rows of a token and `heads` of its heads.
template <auto kKernel, typename... Args>
cudaError_t launch(cudaStream_t stream, const AttendCall& call, int64_t heads, int splits, bool is_cluster, int threads,
                   int bytes, const Args&... args) {
  // Every time: attributes are those of the kernel on one device, and a process may have several.
  cudaError_t status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status != cudaSuccess) return status;
  // A grid's last axis has 65,535 blocks at most.
  constexpr int64_t kMostTokens = 65535;
  if (call.tokens > kMostTokens) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim =
      dim3(splits, static_cast<unsigned>((call.heads + heads - 1) / heads), static_cast<unsigned>(call.tokens));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = is_cluster ? splits : 1, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, call, args...);
}

template <bool kGroups, bool kFloat, bool kHeld>
cudaError_t launch_few(cudaStream_t stream, const AttendCall& call) {
  attend_few::Divisors divide;
  divide.ring_rows = attend_few::Divisor(call.ring_rows);
  if (call.has_entries) {
    divide.ratio = attend_few::Divisor(call.ratio), divide.per_block = attend_few::Divisor(call.per_block);
  }
  return launch<attend_few::attend_kernel<kGroups, kFloat, kHeld>>(stream, call, attend_few::kHeads,
                                                                   splits_for_few(call), true, attend_few::kThreads,
                                                                   attend_few::kSharedBytes<kGroups>, divide);
}

template <bool kGroups, bool kFloat>
cudaError_t launch_window(cudaStream_t stream, const AttendCall& call) {
  return launch<attend_window::attend_kernel<kGroups, kFloat>>(stream, call, attend_window::kHeads, 1, false,
                                                               attend_window::kThreads, attend_window::kSharedBytes);
}

template <bool kGroups>
cudaError_t launch_many(cudaStream_t stream, const AttendCall& call) {
  // What adding up in a second kernel takes, in blocks of rows.
  constexpr int64_t kBlocksOfCombine = 3;
  const int64_t blocks = blocks_of(call);
  const auto most = [&](int64_t parts) { return (blocks + parts - 1) / parts; };  // blocks of rows of a thread block
  const int in_cluster = splits_of(blocks, clusters_of(call, attend_sm90::kHeads));
  const bool left = call.partials && most(call.parts) + kBlocksOfCombine < most(in_cluster);
  const int splits = left ? static_cast<int>(call.parts) : in_cluster;
  const cudaError_t status = launch<attend_sm90::attend_kernel<kGroups>>(
      stream, call, attend_sm90::kHeads, splits, !left, attend_sm90::kThreads, attend_sm90::kSharedBytes<kGroups>,
      left ? call.partials : nullptr);
  if (status != cudaSuccess || !left) return status;
  cudaLaunchConfig_t config{};
  const int64_t warps = 4 * call.heads;
  config.gridDim = dim3(static_cast<unsigned>((warps + attend_sm90::kCombineWarps - 1) / attend_sm90::kCombineWarps),
                        static_cast<unsigned>(call.tokens));
  config.blockDim = dim3(32 * attend_sm90::kCombineWarps);
  config.stream = stream;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &early, config.numAttrs = 1;
  const float* const partials = call.partials;
  return cudaLaunchKernelEx(&config, attend_sm90::combine_kernel, call, partials, splits);
}

template <bool kGroups, bool kFloat>
cudaError_t launch_one(cudaStream_t stream, const AttendCall& call) {
  if (is_for_few(call)) {
    return is_held(call) ? launch_few<kGroups, kFloat, true>(stream, call)
                         : launch_few<kGroups, kFloat, false>(stream, call);
  }
  const bool one_unit = !call.has_entries && blocks_of(call) * kRows <= attend_window::kRows;
  if (one_unit) return launch_window<kGroups, kFloat>(stream, call);
  return launch_many<kGroups>(stream, call);
}

ffi::Error attend(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results,
                  const AttendAttributes& attributes) {
  AttendCall call;
  const ffi::Error error = bind_attend(args, results, attributes, &call);
  if (error.failure()) return error;
  if (call.ring.nope_width != attend_sm90::kNope || call.ring.rope_width != attend_sm90::kRope ||
      (call.cos && call.pairs != attend_sm90::kRope / 2)) {
    return ffi::Error::InvalidArgument("attend: got records of other widths; expected 448 + 64 values.");
  }
  if (call.tokens == 0 || call.heads == 0) return ffi::Error::Success();
  const bool groups = call.ring.scale_width != 0;
  if (call.partials) {
    const auto dims = (*results.get<ffi::AnyBuffer>(1))->dimensions();
    const int64_t groups_of_heads = clusters_of(call, attend_sm90::kHeads) / call.tokens;
    if (dims[1] != groups_of_heads || dims[2] < 1 || dims[3] != attend_sm90::kPartial) {
      return ffi::Error::InvalidArgument("attend: got scratch of another shape; expected (T, groups, parts, " +
                                         std::to_string(attend_sm90::kPartial) + ").");
    }
  }
  auto* const run = groups          ? call.is_float ? launch_one<true, true> : launch_one<true, false>
                    : call.is_float ? launch_one<false, true>
                                    : launch_one<false, false>;
  return launched("attend", run(stream, call));
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4Attend, dsv4::attend, .Attrs<dsv4::AttendAttributes>());
