// multiply_each on CUDA: bfloat16 weights of one input, a few tokens. Contract and jax.numpy form:
// dsv4_jax/ops/nn/dense.py.
//
// A block has 16 or 32 rows of one weight, each of its warps an eighth of the columns. The order in which a product
// runs over its columns is free: a thread takes 16 contiguous bytes of a row of the weight, and of x, as operands of
// two products, and so copies to shared memory what it alone will read.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "common/export.h"
#include "common/launched.h"
#include "common/operands.h"
#include "cuda/ptx.cuh"

namespace dsv4 {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kStep = 32;  // columns of two products
constexpr int kMostWeights = 8, kMostTokens = 64;

struct DenseWeight {
  const __nv_bfloat16* w;  // (rows, columns)
  void* y;                 // (T, rows)
  int first_block, rows;
};

struct DenseCall {
  const __nv_bfloat16* x;  // (T, columns)
  DenseWeight weights[kMostWeights];
  int number, tokens, columns;
  bool is_float;  // the results
};

__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <int kPlaces, int kTiles, int kAhead>
constexpr int dense_shared() {
  constexpr int kRing = kAhead * (kTiles * 2 + kPlaces) * kThreads * 16, kSums = kWarps * 8 * kPlaces * 16 * kTiles * 4;
  return kRing > kSums ? kRing : kSums;
}

// kPlaces: tokens by 8; kTiles: rows of a block by 16; kAhead: steps whose weights are under way. Each thread copies
// what it will itself multiply.
template <int kPlaces, int kTiles, int kAhead>
__global__ void __launch_bounds__(kThreads) dense_kernel(const __grid_constant__ DenseCall call) {
  extern __shared__ __align__(16) uint8_t shared[];
  constexpr int kOfStep = 2 * kTiles + kPlaces;                  // pieces of a thread
  uint4* ring = reinterpret_cast<uint4*>(shared) + threadIdx.x;  // (ahead, tiles by halves and tokens, threads)
  float* sums = reinterpret_cast<float*>(shared);                // (warps, tokens, rows), afterwards
  constexpr int kRows = 16 * kTiles, kTokens = 8 * kPlaces;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  DenseWeight weight = call.weights[0];
#pragma unroll
  for (int i = 1; i < kMostWeights; ++i) {
    if (i < call.number && static_cast<int>(blockIdx.x) >= call.weights[i].first_block) weight = call.weights[i];
  }
  const int first_row = (blockIdx.x - weight.first_block) * kRows, slice = call.columns / kWarps,
            pitch = call.columns / 8;
  const int steps = slice / kStep;
  const uint4* w =
      reinterpret_cast<const uint4*>(weight.w + static_cast<int64_t>(first_row + g) * call.columns + warp * slice) + c;
  const uint4* x = reinterpret_cast<const uint4*>(call.x + static_cast<int64_t>(g) * call.columns + warp * slice) + c;
  const auto copy = [&](int step) {
    if (step < steps) {
#pragma unroll
      for (int i = 0; i < 2 * kTiles; ++i)
        ptx::copy_16(ptx::shared_address(ring + (step % kAhead * kOfStep + i) * kThreads),
                     w + step * (kStep / 8) + i * 8 * pitch);
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        if (p * 8 + g < call.tokens)
          ptx::copy_16(ptx::shared_address(ring + (step % kAhead * kOfStep + 2 * kTiles + p) * kThreads),
                       x + step * (kStep / 8) + p * 8 * pitch);
      }
    }
    ptx::copies_commit();
  };
#pragma unroll 1
  for (int step = 0; step < kAhead - 1; ++step) copy(step);
  float sum[kTiles][kPlaces][4] = {};
#pragma unroll 2
  for (int step = 0; step < steps; ++step) {
    copy(step + kAhead - 1);
    ptx::copies_wait<kAhead - 1>();
    const uint4* own = ring + step % kAhead * kOfStep * kThreads;
    uint4 b[kPlaces];
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
      b[p] = make_uint4(0, 0, 0, 0);
      if (p * 8 + g < call.tokens) b[p] = own[(2 * kTiles + p) * kThreads];
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const uint4 q = own[2 * t * kThreads], r = own[(2 * t + 1) * kThreads];
#pragma unroll
      for (int p = 0; p < kPlaces; ++p) {
        multiply(sum[t][p], q.x, r.x, q.y, r.y, b[p].x, b[p].y);
        multiply(sum[t][p], q.z, r.z, q.w, r.w, b[p].z, b[p].w);
      }
    }
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int p = 0; p < kPlaces; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        sums[(warp * kTokens + p * 8 + c * 2 + i % 2) * kRows + t * 16 + i / 2 * 8 + g] = sum[t][p][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < call.tokens * kRows; i += kThreads) {
    float total = 0.0f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) total += sums[from * kTokens * kRows + i];
    const int64_t to = static_cast<int64_t>(i / kRows) * weight.rows + first_row + i % kRows;
    if (call.is_float) {
      static_cast<float*>(weight.y)[to] = total;
    } else {
      static_cast<__nv_bfloat16*>(weight.y)[to] = __float2bfloat16_rn(total);
    }
  }
}

template <int kPlaces, int kTiles, int kAhead>
cudaError_t run(DenseCall& call, cudaStream_t stream) {
  const auto kernel = dense_kernel<kPlaces, kTiles, kAhead>;
  const int shared = dense_shared<kPlaces, kTiles, kAhead>();
  const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  int blocks = 0;
  for (int i = 0; i < call.number; ++i) {
    call.weights[i].first_block = blocks;
    blocks += call.weights[i].rows / (16 * kTiles);
  }
  kernel<<<blocks, kThreads, shared, stream>>>(call);
  return cudaGetLastError();
}

// Operands: x (T, K) and weights (N, K), bfloat16. Results: (T, N) for each, all bfloat16 or all float.
ffi::Error dense_on_device(cudaStream_t stream, ffi::RemainingArgs args, ffi::RemainingRets results) {
  constexpr auto kBf16 = ffi::DataType::BF16;
  Operands operands("multiply_each", args);
  const Operands::Shape x = operands.shape_of_next();
  DenseCall call = {};
  if (x.size() != 2 || x[0] > kMostTokens || x[1] % (kWarps * kStep)) {
    operands.fail("x " + Operands::text(x), "(T up to 64, a multiple of 256)");
    return operands.error();
  }
  call.x = operands.take<const __nv_bfloat16>("x", {kBf16}, x);
  call.tokens = static_cast<int>(x[0]), call.columns = static_cast<int>(x[1]);
  while (operands.ok() && operands.left()) {
    const Operands::Shape shape = operands.shape_of_next();
    auto y = results.get<ffi::AnyBuffer>(call.number);
    if (call.number == kMostWeights || shape.size() != 2 || shape[0] % 32 || !y.has_value() ||
        (*y)->element_count() != static_cast<size_t>(x[0] * shape[0])) {
      operands.fail("a weight " + Operands::text(shape), "up to 8, of a multiple of 32 rows, and a result for each");
      break;
    }
    call.is_float = (*y)->element_type() == ffi::DataType::F32;
    DenseWeight& weight = call.weights[call.number++];
    weight.w = operands.take<const __nv_bfloat16>("weight", {kBf16}, {shape[0], x[1]});
    weight.y = (*y)->untyped_data(), weight.rows = static_cast<int>(shape[0]);
  }
  if (!operands.ok()) return operands.error();
  if (!call.tokens || !call.number) return ffi::Error::Success();
  return launched("multiply_each", call.tokens <= 8    ? run<1, 1, 8>(call, stream)
                                   : call.tokens <= 16 ? run<2, 1, 8>(call, stream)
                                   : call.tokens <= 32 ? run<4, 2, 4>(call, stream)
                                                       : run<8, 2, 4>(call, stream));
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Dense);
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    Dsv4Dense, dsv4::dense_on_device,
    xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(),
    {xla::ffi::Traits::kCmdBufferCompatible});
