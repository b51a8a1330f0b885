// attend on the GPU: compute capability 9.0.
#include <cuda_runtime.h>

#include "attend/op.h"
#include "attend/sm90.cuh"
#include "common/export.h"
#include "common/launched.h"

namespace dsv4 {
namespace {

constexpr int kMostSplits = 16;  // thread blocks of a cluster

// Clusters of so many thread blocks that run at once on an H200, as cudaOccupancyMaxActiveClusters says of it: a cluster
// lies in one of the chip's eight parts. One cluster more than that takes twice as long.
constexpr int kClusters[kMostSplits + 1] = {0, 132, 66, 39, 30, 22, 17, 15, 15, 9, 7, 7, 7, 7, 7, 7, 7};

// In how many parts the rows of a token are taken: from shapes alone, so that a token's bits follow from them too. As few
// as give the parts the fewest blocks of rows, of those of which all clusters run at once.
int splits_of(const AttendCall& call, int64_t head_groups) {
  const int64_t entries = !call.has_entries ? 0 : call.selected ? call.chosen : call.max_entries;
  const int64_t rows = attend_sm90::kRows;
  const int64_t blocks = (call.window + rows - 1) / rows + (entries + rows - 1) / rows;
  int best = 1;
  for (int splits = 2; splits <= kMostSplits; ++splits) {
    const bool together = call.tokens * head_groups <= kClusters[splits];
    if (together && (blocks + splits - 1) / splits < (blocks + best - 1) / best) best = splits;
  }
  return best;
}

template <bool kGroups>
cudaError_t launch(cudaStream_t stream, const AttendCall& call) {
  const auto kernel = attend_sm90::attend_kernel<kGroups>;
  static const cudaError_t prepared = [&] {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, attend_sm90::kSharedBytes<kGroups>);
    return status != cudaSuccess ? status
                                 : cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }();
  if (prepared != cudaSuccess) return prepared;
  const int64_t head_groups = (call.heads + attend_sm90::kHeads - 1) / attend_sm90::kHeads;
  const auto splits = static_cast<unsigned>(splits_of(call, head_groups));
  // A grid's last axis has 65,535 blocks at most.
  constexpr int64_t kMostTokens = 65535;
  if (call.tokens > kMostTokens) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(splits, static_cast<unsigned>(head_groups), static_cast<unsigned>(call.tokens));
  config.blockDim = dim3(attend_sm90::kThreads);
  config.dynamicSmemBytes = attend_sm90::kSharedBytes<kGroups>;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = splits, cluster.val.clusterDim.y = 1, cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call);
}

ffi::Error attend(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                  int64_t window, int64_t ratio, float scale, float eps, int64_t max_entries, int64_t has_entries,
                  int64_t has_selected, int64_t has_fresh, int64_t raw) {
  AttendCall call;
  const ffi::Error error = bind_attend(args, results, layer, window, ratio, scale, eps, max_entries, has_entries,
                                       has_selected, has_fresh, raw, &call);
  if (error.failure()) return error;
  if (call.ring.nope_width != attend_sm90::kNope || call.ring.rope_width != attend_sm90::kRope ||
      (call.cos && call.pairs != attend_sm90::kRope / 2)) {
    return ffi::Error::InvalidArgument("attend: got records of other widths; expected 448 + 64 values.");
  }
  if (call.tokens == 0 || call.heads == 0) return ffi::Error::Success();
  const bool groups = call.ring.scale_width != 0;
  return launched("attend", groups ? launch<true>(stream, call) : launch<false>(stream, call));
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Attend);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Attend, dsv4::attend,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("ratio")
                                  .Attr<float>("scale")
                                  .Attr<float>("eps")
                                  .Attr<int64_t>("max_entries")
                                  .Attr<int64_t>("has_entries")
                                  .Attr<int64_t>("has_selected")
                                  .Attr<int64_t>("has_fresh")
                                  .Attr<int64_t>("raw"),
                              {xla::ffi::Traits::kCmdBufferCompatible});
