// A cluster takes one or a few tokens through a hyper-connection: the streams after the last update, their mixing
// coefficients, and what the next part of the layer reads, normed. Contract: dsv4_jax/ops/nn/hyper_connect.py.
//
// Every block of the cluster has a sixteenth of each stream's columns. What is summed over all columns, the products
// with `fn` and the squares, is exchanged twice through distributed shared memory.
#ifndef DSV4_HYPER_CONNECT_KERNEL_CUH_
#define DSV4_HYPER_CONNECT_KERNEL_CUH_

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dsv4 {
namespace hyper_connect {

namespace cg = cooperative_groups;

constexpr int kStreams = 4;
constexpr int kCluster = 16;
constexpr int kWarp = 32;
constexpr int kMostColumns = 448;                    // of a stream in a block; as many threads work on them
constexpr int kMostThreads = kMostColumns + kWarp;   // one warp more for the mixing matrices
constexpr int kMixes = kStreams * (2 + kStreams);    // coefficients of a token before they are activated
constexpr int kColumnsBarrier = 1;                   // of all threads but the warp for matrices

struct Call {
  const __nv_bfloat16* streams;  // (T, n, d)
  const __nv_bfloat16* output;   // (T, d), null without an update
  const float* old_post;         // (T, n)
  const float* old_comb;         // (T, n, n)
  const float* fn;               // (kMixes | n, n * d)
  const float* base;             // (kMixes | n)
  const float* scale;            // (3 | 1)
  const float* norm;             // (d)
  __nv_bfloat16* new_streams;    // (T, n, d), with an update
  __nv_bfloat16* x;              // (T, d)
  float* post;                   // (T, n), not of the head
  float* comb;                   // (T, n, n), not of the head
  int tokens, dim, iterations;
  float hc_eps, rms_eps;
};

__device__ inline float4 widen(uint2 packed) {
  const float2 low = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed.x));
  const float2 high = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&packed.y));
  return make_float4(low.x, low.y, high.x, high.y);
}

__device__ inline uint2 narrow(float4 v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y), high = __floats2bfloat162_rn(v.z, v.w);
  return make_uint2(*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high));
}

__device__ inline float dot(float4 a, float4 b) { return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w; }

__device__ inline float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

// Sums each of 32 values over a warp; lane i returns the sum of value i. 31 shuffles instead of 160.
template <int kHalf = kWarp / 2>
__device__ inline float sums_by_lane(float (&v)[kWarp], int lane) {
  const bool upper = lane & kHalf;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float mine = upper ? v[i + kHalf] : v[i], others = upper ? v[i] : v[i + kHalf];
    v[i] = mine + __shfl_xor_sync(~0u, others, kHalf);
  }
  if constexpr (kHalf > 1) return sums_by_lane<kHalf / 2>(v, lane);
  return v[0];
}

// A token's mixing matrix from its logits, [j, k]: softmax over k, then the Sinkhorn divisions as factors of its rows
// and columns, which a thread keeps in registers.
__device__ inline void mixing_matrix(const float* logits, int iterations, float eps, float* result) {
  float m[kStreams][kStreams], row[kStreams], column[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float* l = logits + j * kStreams;
    const float most = fmaxf(fmaxf(l[0], l[1]), fmaxf(l[2], l[3]));
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < kStreams; ++k) sum += m[j][k] = expf(l[k] - most);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) m[j][k] = m[j][k] / sum + eps;
    row[j] = column[j] = 1.0f;
  }
  for (int i = 0; i < iterations; ++i) {
    if (i) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        const float sum = m[j][0] * column[0] + m[j][1] * column[1] + (m[j][2] * column[2] + m[j][3] * column[3]);
        row[j] = __fdividef(row[j], row[j] * sum + eps);
      }
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float sum = m[0][k] * row[0] + m[1][k] * row[1] + (m[2][k] * row[2] + m[3][k] * row[3]);
      column[k] = __fdividef(column[k], column[k] * sum + eps);
    }
  }
#pragma unroll
  for (int j = 0; j < kStreams; ++j)
    reinterpret_cast<float4*>(result)[j] =
        make_float4(row[j] * m[j][0] * column[0], row[j] * m[j][1] * column[1], row[j] * m[j][2] * column[2],
                    row[j] * m[j][3] * column[3]);
}

// Threads: dim / 16 for columns and a warp for matrices. kHead: there is only what is read, nothing to write back.
template <int kTokens, bool kHead>
__global__ void __launch_bounds__(kMostThreads, 1) hyper_connect_kernel(const Call call) {
  constexpr int kRows = kHead ? kStreams : kMixes;  // row kRows of what is summed are the squares
  constexpr int kInGroup = kWarp / kTokens;         // rows that a warp sums at once, for every token
  constexpr int kValues = kWarp * kTokens;
  __shared__ __align__(16) __nv_bfloat16 tile[kTokens][kStreams][kMostColumns];
  __shared__ float of_warps[kMostColumns / kWarp][kValues], of_blocks[kCluster][kValues];
  __shared__ float squares_of_warps[kMostColumns / kWarp][kTokens], squares_of_blocks[kCluster][kTokens];
  __shared__ float pre[kTokens][kStreams], logits[kTokens][kStreams * kStreams];
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), columns = call.dim / kCluster, thread = threadIdx.x;
  const int warp = thread / kWarp, lane = thread % kWarp, warps = columns / kWarp;
  const int first = blockIdx.x / kCluster * kTokens;
  const bool for_columns = thread < columns;
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // that all run, before one writes to another

  if (for_columns) {
    // Four columns of one stream.
    const int stream = thread / (columns / 4), quad = thread % (columns / 4) * 4, column = rank * columns + quad;
    const float* fn = call.fn + static_cast<int64_t>(stream) * call.dim + column;
    const int64_t fn_row = static_cast<int64_t>(kStreams) * call.dim;
    constexpr int kAhead = kInGroup < kRows ? kInGroup : kRows;
    float4 w[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) w[i] = __ldg(reinterpret_cast<const float4*>(fn + i * fn_row));
    float4 v[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      const int64_t token = min(first + t, call.tokens - 1);
      const __nv_bfloat16* old = call.streams + token * kStreams * call.dim + column;
      const auto load = [](const __nv_bfloat16* from) { return *reinterpret_cast<const uint2*>(from); };
      uint2 packed = {};
      if (call.output) {
        const float post = call.old_post[token * kStreams + stream];
        float4 sum = {};
#pragma unroll
        for (int j = 0; j < kStreams; ++j) {
          const float4 other = widen(load(old + j * call.dim));
          const float comb = call.old_comb[(token * kStreams + j) * kStreams + stream];
          sum.x += comb * other.x, sum.y += comb * other.y, sum.z += comb * other.z, sum.w += comb * other.w;
        }
        const float4 out = widen(load(call.output + token * call.dim + column));
        packed = narrow(make_float4(post * out.x + sum.x, post * out.y + sum.y, post * out.z + sum.z,
                                    post * out.w + sum.w));
        if (first + t < call.tokens)
          *reinterpret_cast<uint2*>(call.new_streams + (token * kStreams + stream) * call.dim + column) = packed;
      } else {
        packed = load(old + stream * call.dim);
      }
      *reinterpret_cast<uint2*>(&tile[t][stream][quad]) = packed;
      v[t] = widen(packed);
    }
#pragma unroll
    for (int g = 0; g * kInGroup <= kRows; ++g) {
      float sums[kWarp];
#pragma unroll
      for (int i = 0; i < kInGroup; ++i) {
        const int row = g * kInGroup + i;
#pragma unroll
        for (int t = 0; t < kTokens; ++t)
          sums[t * kInGroup + i] = row < kRows ? dot(w[i < kAhead ? i : 0], v[t]) : row == kRows ? dot(v[t], v[t]) : 0.0f;
        const int next = row + kInGroup;
        if (next < kRows) w[i < kAhead ? i : 0] = __ldg(reinterpret_cast<const float4*>(fn + next * fn_row));
      }
      of_warps[warp][lane / kInGroup * kWarp + g * kInGroup + lane % kInGroup] = sums_by_lane(sums, lane);
    }
  }
  __syncthreads();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  for (int i = thread; i < kCluster * kValues; i += blockDim.x) {
    const int value = i % kValues;
    if (value % kWarp > kRows) continue;
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += of_warps[w][value];
    *cluster.map_shared_rank(&of_blocks[rank][value], i / kValues) = sum;
  }
  cluster.sync();

  if (warp < kTokens && lane <= kRows) {
    float mix = 0.0f;
#pragma unroll
    for (int block = 0; block < kCluster; ++block) mix += of_blocks[block][warp * kWarp + lane];
    const float squares = __shfl_sync((2u << kRows) - 1, mix, kRows);
    mix *= rsqrtf(squares / (kStreams * call.dim) + call.rms_eps);
    const int64_t token = first + warp;
    if (lane < kStreams) {
      pre[warp][lane] = sigmoid(mix * call.scale[0] + call.base[lane]) + call.hc_eps;
    } else if (!kHead && lane < kRows) {
      const bool of_post = lane < 2 * kStreams;
      const float value = mix * call.scale[of_post ? 1 : 2] + call.base[lane];
      if (!of_post) {
        logits[warp][lane - 2 * kStreams] = value;
      } else if (!rank && token < call.tokens) {
        call.post[token * kStreams + lane - kStreams] = 2.0f * sigmoid(value);
      }
    }
  }
  __syncthreads();
  if (!for_columns) {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");  // it waits for nothing more
    if (!kHead && !rank && lane < kTokens && first + lane < call.tokens)
      mixing_matrix(logits[lane], call.iterations, call.hc_eps,
                    call.comb + static_cast<int64_t>(first + lane) * kStreams * kStreams);
    return;
  }

  float read[kTokens];
  const int column = rank * columns + thread;
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kStreams; ++j) sum += pre[t][j] * __bfloat162float(tile[t][j][thread]);
    read[t] = __bfloat162float(__float2bfloat16_rn(sum));
    float squares = read[t] * read[t];
#pragma unroll
    for (int half = kWarp / 2; half; half /= 2) squares += __shfl_xor_sync(~0u, squares, half);
    if (!lane) squares_of_warps[warp][t] = squares;
  }
  asm volatile("bar.sync %0, %1;" ::"n"(kColumnsBarrier), "r"(columns) : "memory");
  if (thread < kCluster * kTokens) {
    float sum = 0.0f;
    for (int w = 0; w < warps; ++w) sum += squares_of_warps[w][thread % kTokens];
    *cluster.map_shared_rank(&squares_of_blocks[rank][thread % kTokens], thread / kTokens) = sum;
  }
  const float weight = call.norm[column];
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#pragma unroll
  for (int t = 0; t < kTokens; ++t) {
    if (first + t >= call.tokens) break;
    float squares = 0.0f;
#pragma unroll
    for (int block = 0; block < kCluster; ++block) squares += squares_of_blocks[block][t];
    call.x[static_cast<int64_t>(first + t) * call.dim + column] =
        __float2bfloat16_rn(read[t] * rsqrtf(squares / call.dim + call.rms_eps) * weight);
  }
}

}  // namespace hyper_connect
}  // namespace dsv4

#endif  // DSV4_HYPER_CONNECT_KERNEL_CUH_
