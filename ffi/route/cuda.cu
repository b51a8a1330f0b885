// choose_experts and route on CUDA: a warp a token. Contract and jax.numpy form: dsv4_jax/ops/nn/router.py.
#include <cuda_runtime.h>

#include "common/export.h"
#include "common/launched.h"
#include "common/operands.h"
#include "dense/product.cuh"

namespace dsv4 {
namespace {

constexpr int kWarp = 32, kWarps = 4;  // of a block
constexpr int kMostExperts = 1024, kMostPicks = 32;
constexpr int kTokensOfCluster = 8, kMostTokens = 32;  // from activations
constexpr unsigned kAll = 0xFFFFFFFFu;

struct RouteCall {
  const float* logits;          // (T, experts), or null
  const __nv_bfloat16* x;       // (T, columns) otherwise
  const __nv_bfloat16* weight;  // (experts, columns)
  const float* bias;            // (experts), or null
  const int* table;             // (vocabulary, k), or null
  const int* tokens;            // (T) rows of the table
  const int* slots;             // (T), below 0 for padding; or null
  int* picks;                   // (T, k)
  float* weights;               // (T, k)
  int number, experts, k, vocabulary, columns;
  float scaling;
};

// Greater for what top_k puts first; a NaN is the greatest, and both zeros are one.
__device__ unsigned rank_of(float score) {
  if (score != score) return kAll;
  const unsigned bits = __float_as_uint(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// sqrt(log(1 + exp(x))).
__device__ float score_of(float logit) { return sqrtf(fmaxf(logit, 0.0f) + log1pf(expf(-fabsf(logit)))); }

// A warp chooses for a token. kEach: experts that a lane has.
template <int kEach>
__device__ __forceinline__ void choose(const RouteCall& call, const float* logits, int token, int lane) {
  const int64_t to = static_cast<int64_t>(token) * call.k + lane;
  if (call.slots && call.slots[token] < 0) {
    if (lane < call.k) call.picks[to] = -1, call.weights[to] = 0.0f;
    return;
  }
  int pick = 0;
  if (call.table) {
    const int row = min(max(call.tokens[token], 0), call.vocabulary - 1);
    if (lane < call.k) pick = call.table[static_cast<int64_t>(row) * call.k + lane];
  } else {
    float logit[kEach], bias[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {  // all of them under way before the first is used
      const int e = min(i * kWarp + lane, call.experts - 1);
      logit[i] = logits[e], bias[i] = __ldg(call.bias + e);
    }
    unsigned ranks[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      ranks[i] = i * kWarp + lane < call.experts ? max(1u, rank_of(score_of(logit[i]) + bias[i])) : 0;
#pragma unroll 1
    for (int k = 0; k < call.k; ++k) {
      unsigned best = 0;
      int at = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (ranks[i] > best) best = ranks[i], at = i;
      }
      const unsigned most = __reduce_max_sync(kAll, best);
      const int chosen = __reduce_min_sync(kAll, best == most ? at * kWarp + lane : kMostExperts);
      if (lane == k) pick = chosen;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (i * kWarp + lane == chosen) ranks[i] = 0;
      }
    }
  }
  const float score = lane < call.k ? score_of(logits[min(max(pick, 0), call.experts - 1)]) : 0.0f;
  float sum = 0.0f;
  for (int k = 0; k < call.k; ++k) sum += __shfl_sync(kAll, score, k);
  if (lane < call.k) {
    call.picks[to] = pick;
    call.weights[to] = score / (sum + 1e-20f) * call.scaling;
  }
}

template <int kEach>
__global__ void __launch_bounds__(kWarp* kWarps) choose_kernel(const RouteCall call) {
  const int token = blockIdx.x * kWarps + threadIdx.x / kWarp;
  if (token < call.number)
    choose<kEach>(call, call.logits + static_cast<int64_t>(token) * call.experts, token, threadIdx.x % kWarp);
}

// A cluster has all experts, 16 or 32 a thread block, and eight tokens, of which a block chooses for one.
template <int kTiles, int kEach>
__global__ void __launch_bounds__(dense::kThreads) route_kernel(const __grid_constant__ RouteCall call) {
  extern __shared__ __align__(16) uint8_t shared[];
  __shared__ float logits[kEach * kWarp];
  ptx::cluster_arrive_relaxed();  // that all are ready to be sent to
  constexpr int kRows = 16 * kTiles;
  const int blocks = call.experts / kRows, rank = blockIdx.x % blocks, first = blockIdx.x / blocks * kTokensOfCluster;
  const int tokens = min(kTokensOfCluster, call.number - first);
  const uint32_t own = ptx::shared_address(logits + rank * kRows);
  dense::multiply_rows<1, kTiles, 8>(
      call.weight + static_cast<int64_t>(rank) * kRows * call.columns,
      call.x + static_cast<int64_t>(first) * call.columns, tokens, call.columns, shared,
      [&](int token, int row, float logit) { ptx::store_remote(ptx::address_in(own + row * 4, token), logit); },
      [] { ptx::cluster_wait(); });
  ptx::cluster_sync();
  if (rank < tokens && threadIdx.x < kWarp) choose<kEach>(call, logits, first + rank, threadIdx.x);
}

template <int kTiles, int kEach>
cudaError_t run(const RouteCall& call, cudaStream_t stream) {
  const auto kernel = route_kernel<kTiles, kEach>;
  constexpr int kShared = dense::shared_bytes<1, kTiles, 8>();
  cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (status != cudaSuccess) return status;
  const int blocks = call.experts / (16 * kTiles);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks * ((call.number + kTokensOfCluster - 1) / kTokensOfCluster));
  config.blockDim = dim3(dense::kThreads), config.dynamicSmemBytes = kShared, config.stream = stream;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks, cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, call);
}

// Operands: logits (T, experts), or x (T, columns) and weight (experts, columns), bfloat16; then bias (experts), or
// table (vocabulary, k) and tokens (T); then perhaps slots (T). Results: picks, weights.
ffi::Error route_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t k,
                           float scaling, int64_t has_slots, int64_t from_x) {
  constexpr auto kF32 = ffi::DataType::F32, kS32 = ffi::DataType::S32, kBf16 = ffi::DataType::BF16;
  Operands operands(from_x ? "route" : "choose_experts", args);
  const Operands::Shape first = operands.shape_of_next(), of_weight = operands.shape_of_next(1);
  const Operands::Shape second = operands.shape_of_next(from_x ? 2 : 1);
  Operands::Shape shape = first;
  if (from_x) {
    if (first.size() != 2 || of_weight.size() != 2 || first[0] > kMostTokens || first[1] % 256 || of_weight[0] < 128 ||
        of_weight[0] > 512 || of_weight[0] % (of_weight[0] > 256 ? 32 : 16)) {
      operands.fail("x " + Operands::text(first) + " and weight " + Operands::text(of_weight),
                    "up to 32 tokens, multiples of 256 columns, 128 to 512 experts by 16, above 256 by 32");
      return operands.error();
    }
    shape[1] = of_weight[0];
  }
  if (shape.size() != 2 || shape[1] < 1 || shape[1] > kMostExperts || k < 1 || k > kMostPicks || k > shape[1]) {
    operands.fail("logits " + Operands::text(shape), "(T, up to 1024 experts), and up to 32 picks");
    return operands.error();
  }
  RouteCall call = {};
  if (from_x) {
    call.x = operands.take<const __nv_bfloat16>("x", {kBf16}, first);
    call.weight = operands.take<const __nv_bfloat16>("weight", {kBf16}, {shape[1], first[1]});
    call.columns = static_cast<int>(first[1]);
  } else {
    call.logits = operands.take<const float>("logits", {kF32}, shape);
  }
  if (second.size() == 1) {
    call.bias = operands.take<const float>("bias", {kF32}, {shape[1]});
  } else {
    call.table = operands.take<const int>("table", {kS32}, {-1, k});
    call.tokens = operands.take<const int>("tokens", {kS32}, {shape[0]});
    call.vocabulary = second.empty() ? 0 : static_cast<int>(second[0]);
  }
  if (has_slots) call.slots = operands.take<const int>("slots", {kS32}, {shape[0]});
  auto picks = results.get<ffi::Buffer<ffi::S32>>(0);
  auto weights = results.get<ffi::Buffer<ffi::F32>>(1);
  const size_t size = static_cast<size_t>(shape[0] * k);
  if (!picks.has_value() || !weights.has_value() || (*picks)->element_count() != size ||
      (*weights)->element_count() != size) {
    operands.fail("other results", "picks and weights (T, k)");
  }
  if (!operands.ok()) return operands.error();
  if (!shape[0]) return ffi::Error::Success();
  call.picks = (*picks)->typed_data(), call.weights = (*weights)->typed_data();
  call.number = static_cast<int>(shape[0]), call.experts = static_cast<int>(shape[1]), call.k = static_cast<int>(k);
  call.scaling = scaling;
  if (from_x) return launched("route", call.experts > 256 ? run<2, 16>(call, stream) : run<1, 8>(call, stream));
  const auto kernel = call.experts <= 8 * kWarp    ? choose_kernel<8>
                      : call.experts <= 16 * kWarp ? choose_kernel<16>
                                                   : choose_kernel<kMostExperts / kWarp>;
  kernel<<<(call.number + kWarps - 1) / kWarps, kWarp * kWarps, 0, stream>>>(call);
  return launched("choose_experts", cudaGetLastError());
}

}  // namespace
}  // namespace dsv4

DSV4_CUDA_HANDLER(Dsv4Route, dsv4::route_on_device,
                  .Attr<int64_t>("k").Attr<float>("scaling").Attr<int64_t>("has_slots").Attr<int64_t>("from_x"));
