// A cluster takes one or a few tokens through a hyper-connection: the streams after the last update, their mixing
// coefficients, and what the next part of the layer reads, normed. Contract: dsv4_jax/ops/nn/hyper_connect.py.
//
// Every block of the cluster has a sixteenth of each stream's columns, and of `fn`, which is copied while the update is
// computed. What is summed over all columns, the products with `fn` and then the squares, each block sends to all
// others through distributed shared memory, where a barrier counts the bytes. Loops are not unrolled further than they
// must be: a step runs this code once, and fetches it from memory as it runs.
#ifndef DSV4_HYPER_CONNECT_KERNEL_CUH_
#define DSV4_HYPER_CONNECT_KERNEL_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx.cuh"

namespace dsv4 {
namespace hyper_connect {

constexpr int kStreams = 4;
constexpr int kCluster = 16;
constexpr int kWarp = 32;
constexpr int kLeastColumns = 224;  // of a stream in a block; as many threads work on them
constexpr int kMostColumns = 448;
constexpr int kMostThreads = kMostColumns + kWarp;  // one warp more for copies and the mixing matrices
constexpr int kMixes = kStreams * (2 + kStreams);   // coefficients of a token before they are activated
constexpr int kRowsOfWarp = 3, kRowWarps = kMixes / kRowsOfWarp;
static_assert(kLeastColumns / kWarp + 1 >= kRowWarps, "a warp for three rows");
constexpr int kSquares = kMixes;    // place of a token's squares among its sums
constexpr int kColumnsBarrier = 1;  // of all threads but the extra warp

struct Call {
  const __nv_bfloat16* streams;  // (T, n, d)
  const __nv_bfloat16* output;   // (T, d), null without an update
  const __nv_bfloat16* extra;    // (T, d), added to the output, or null
  const float* old_post;         // (T, n)
  const float* old_comb;         // (T, n, n)
  const float* fn;               // (rows, n * d)
  const float* base;             // (rows)
  const float* scale;            // (3 | 1)
  const float* norm;             // (d)
  __nv_bfloat16* new_streams;    // (T, n, d), with an update
  __nv_bfloat16* x;              // (T, d)
  float* post;                   // (T, n), not of the head
  float* comb;                   // (T, n, n), not of the head
  int tokens, dim, rows;         // kMixes rows, of the head kStreams
  int iterations;
  float hc_eps, rms_eps, of_values, of_columns;  // 1 / (n d), 1 / d
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

__device__ inline float dot(float4 a, float4 b, float sum) {
  return fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, sum))));
}

// Stores into the shared memory of a block of the cluster; its barrier counts the four bytes.
__device__ inline void send(const float* to, uint64_t* barrier, float value, int rank) {
  ptx::store_remote_counted(ptx::address_in(ptx::shared_address(to), rank), value,
                            ptx::address_in(ptx::shared_address(barrier), rank));
}

__device__ inline void add(float4& to, float4 v) {
  to = widen(narrow(make_float4(to.x + v.x, to.y + v.y, to.z + v.z, to.w + v.w)));
}

__device__ inline float sigmoid(float v) { return ptx::reciprocal_fast(1.0f + __expf(-v)); }

// Sums each of kCount values over a warp; lane i returns the sum of value i / (32 / kCount).
template <int kCount, int kBit = kWarp / 2>
__device__ inline float sums_by_lane(float* v, int lane) {
  if constexpr (kCount > 1) {
    const bool upper = lane & kBit;
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) {
      const float mine = upper ? v[i + kCount / 2] : v[i], others = upper ? v[i] : v[i + kCount / 2];
      v[i] = mine + __shfl_xor_sync(~0u, others, kBit);
    }
  } else {
    v[0] += __shfl_xor_sync(~0u, v[0], kBit);
  }
  if constexpr (kBit > 1) return sums_by_lane<(kCount > 1 ? kCount / 2 : 1), kBit / 2>(v, lane);
  return v[0];
}

// A token's mixing matrix from its logits, [j, k]: softmax over k, then the Sinkhorn divisions as factors of its rows
// and columns, which a thread keeps in registers.
__device__ inline void mixing_matrix(const float* logits, int iterations, float eps, float* result) {
  float m[kStreams][kStreams], row[kStreams], column[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) {
    const float4 l = reinterpret_cast<const float4*>(logits)[j];
    const float most = fmaxf(fmaxf(l.x, l.y), fmaxf(l.z, l.w));
    m[j][0] = __expf(l.x - most), m[j][1] = __expf(l.y - most);
    m[j][2] = __expf(l.z - most), m[j][3] = __expf(l.w - most);
    const float share = ptx::reciprocal_fast(m[j][0] + m[j][1] + m[j][2] + m[j][3]);
#pragma unroll
    for (int k = 0; k < kStreams; ++k) m[j][k] = fmaf(m[j][k], share, eps);
    row[j] = column[j] = 1.0f;
  }
#pragma unroll 1
  for (int i = 0; i < iterations; ++i) {
    if (i) {
#pragma unroll
      for (int j = 0; j < kStreams; ++j) {
        const float sum = m[j][0] * column[0] + m[j][1] * column[1] + (m[j][2] * column[2] + m[j][3] * column[3]);
        row[j] *= ptx::reciprocal_fast(row[j] * sum + eps);
      }
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      const float sum = m[0][k] * row[0] + m[1][k] * row[1] + (m[2][k] * row[2] + m[3][k] * row[3]);
      column[k] *= ptx::reciprocal_fast(column[k] * sum + eps);
    }
  }
#pragma unroll
  for (int j = 0; j < kStreams; ++j)
    reinterpret_cast<float4*>(result)[j] = make_float4(row[j] * m[j][0] * column[0], row[j] * m[j][1] * column[1],
                                                       row[j] * m[j][2] * column[2], row[j] * m[j][3] * column[3]);
}

// What a block keeps in shared memory besides `fn` and the streams.
template <int kTokens>
struct Sums {
  float of_blocks[kCluster][kTokens][kWarp];  // by the rank they come from
  float squares[kCluster][kTokens], of_warps[kMostColumns / kWarp][kTokens];
  alignas(16) float logits[kTokens][kStreams * kStreams], pre[kTokens][kStreams];
  uint64_t mixes_arrived, squares_arrived;
};

template <int kTokens, bool kStaged>
constexpr int shared_bytes(int dim, int rows) {
  const int values = kStreams * dim / kCluster;
  return (kStaged ? rows * values * 4 : 0) + kTokens * values * 2 + static_cast<int>(sizeof(Sums<kTokens>));
}

// Threads: dim / 16 for columns, and a warp. kStaged: `fn` is copied to shared
// memory; otherwise it is read from the L2, where other clusters have brought it, and two blocks fit a multiprocessor.
template <int kTokens, bool kStaged>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kMostThreads, kStaged ? 1 : 2)
    hyper_connect_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) uint8_t shared[];
  const int rank = blockIdx.x % kCluster, columns = call.dim / kCluster, values = kStreams * columns;
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, warps = columns / kWarp;
  const int first = blockIdx.x / kCluster * kTokens, live = min(kTokens, call.tokens - first);
  float* fn = reinterpret_cast<float*>(shared);  // (rows, values) if staged
  __nv_bfloat16* tile = reinterpret_cast<__nv_bfloat16*>(fn + (kStaged ? call.rows * values : 0));  // (kTokens, values)
  Sums<kTokens>& sums = *reinterpret_cast<Sums<kTokens>*>(tile + kTokens * values);
  const bool for_columns = thread < columns;
  const int row_warps = min(kRowWarps, (call.rows + kRowsOfWarp - 1) / kRowsOfWarp);
  if (thread == columns) {
    ptx::barrier_init(&sums.mixes_arrived, 1), ptx::barrier_init(&sums.squares_arrived, 1);
    ptx::fence_barrier_init();
    ptx::barrier_arrive_expect(&sums.mixes_arrived, kCluster * kTokens * (row_warps * kRowsOfWarp + 1) * 4);
    ptx::barrier_arrive_expect(&sums.squares_arrived, kCluster * kTokens * 4);
  }
  __syncwarp();
  ptx::cluster_arrive_relaxed();  // that all are ready to be sent to

  if (for_columns) {
    // Four columns of one stream.
    const int quads = columns / 4, stream = (thread >= quads) + (thread >= 2 * quads) + (thread >= 3 * quads);
    const int column = rank * columns + (thread - stream * quads) * 4;
    if constexpr (kStaged) {
      const float* from = call.fn + stream * call.dim + column;
#pragma unroll 4
      for (int row = 0; row < call.rows; ++row, from += kStreams * call.dim)
        ptx::copy_16(ptx::shared_address(fn + row * values + thread * 4), from);
    }
    const auto load = [](const __nv_bfloat16* from) { return __ldg(reinterpret_cast<const uint2*>(from)); };
    constexpr int kAtOnce = kTokens < 4 ? kTokens : 4;
#pragma unroll kAtOnce
    for (int t = 0; t < live; ++t) {
      const int64_t token = first + t;
      const __nv_bfloat16* old = call.streams + token * kStreams * call.dim + column;
      uint2 packed;
      if (call.output) {
        const float post = __ldg(call.old_post + token * kStreams + stream);
        float4 out = widen(load(call.output + token * call.dim + column));
        if (call.extra) add(out, widen(load(call.extra + token * call.dim + column)));
        float4 sum = make_float4(post * out.x, post * out.y, post * out.z, post * out.w);
#pragma unroll
        for (int j = 0; j < kStreams; ++j) {
          const float4 other = widen(load(old + j * call.dim));
          const float comb = __ldg(call.old_comb + (token * kStreams + j) * kStreams + stream);
          sum.x += comb * other.x, sum.y += comb * other.y, sum.z += comb * other.z, sum.w += comb * other.w;
        }
        packed = narrow(sum);
        *reinterpret_cast<uint2*>(call.new_streams + (token * kStreams + stream) * call.dim + column) = packed;
      } else {
        packed = load(old + stream * call.dim);
      }
      reinterpret_cast<uint2*>(tile)[t * (values / 4) + thread] = packed;
    }
    if constexpr (kStaged) ptx::copies_wait_all();
  }
  __syncthreads();
  ptx::cluster_wait();

  // A warp has three rows of `fn`, and the squares besides.
  if (warp < row_warps) {
    float sum[(kRowsOfWarp + 1) * kTokens] = {};
    const float4* w[kRowsOfWarp];
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = min(warp * kRowsOfWarp + i, call.rows - 1);
      w[i] = reinterpret_cast<const float4*>(kStaged ? fn + row * values
                                                     : call.fn + row * kStreams * call.dim + rank * columns);
    }
    const int skipped = kStaged ? 0 : (call.dim - columns) / 4;  // from a stream to the next
    int stream = 0, in_stream = lane;
#pragma unroll 2
    for (int at = lane; at < values / 4; at += kWarp, in_stream += kWarp) {
      if (in_stream >= columns / 4) in_stream -= columns / 4, ++stream;
      float4 row[kRowsOfWarp];
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) row[i] = kStaged ? w[i][at] : __ldg(w[i] + at + stream * skipped);
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        const float4 v = widen(reinterpret_cast<const uint2*>(tile)[t * (values / 4) + at]);
#pragma unroll
        for (int i = 0; i < kRowsOfWarp; ++i) sum[t * 4 + i] = dot(row[i], v, sum[t * 4 + i]);
        sum[t * 4 + 3] = dot(v, v, sum[t * 4 + 3]);
      }
    }
    constexpr int kCopies = kWarp / (4 * kTokens);  // lanes that have the same sum
    const float total = sums_by_lane<4 * kTokens>(sum, lane);
    const int t = lane / kCopies / 4, i = lane / kCopies % 4;
    const int place = i == kRowsOfWarp ? kSquares : warp * kRowsOfWarp + i;
    if (i < kRowsOfWarp || !warp) {
#pragma unroll 2
      for (int to = lane % kCopies; to < kCluster; to += kCopies)
        send(&sums.of_blocks[rank][t][place], &sums.mixes_arrived, total, to);
    }
  }

  if (warp < live) ptx::barrier_wait(&sums.mixes_arrived, 0);
  if (warp < live && (lane < call.rows || lane == kSquares)) {
    float mix = 0.0f;
#pragma unroll 8
    for (int block = 0; block < kCluster; ++block) mix += sums.of_blocks[block][warp][lane];
    const float squares = __shfl_sync(__activemask(), mix, kSquares);
    mix *= ptx::inverse_sqrt_fast(squares * call.of_values + call.rms_eps);
    if (lane < call.rows) {
      const int part = min(lane / kStreams, 2);
      const float value = fmaf(mix, __ldg(call.scale + part), __ldg(call.base + lane)), sigma = sigmoid(value);
      if (part == 0) {
        sums.pre[warp][lane] = sigma + call.hc_eps;
      } else if (part == 2) {
        sums.logits[warp][lane - 2 * kStreams] = value;
      } else if (!rank) {
        call.post[static_cast<int64_t>(first + warp) * kStreams + lane - kStreams] = 2.0f * sigma;
      }
    }
  }
  __syncthreads();
  if (!for_columns) {
    if (call.comb && !rank && lane < live)
      mixing_matrix(sums.logits[lane], call.iterations, call.hc_eps,
                    call.comb + static_cast<int64_t>(first + lane) * kStreams * kStreams);
    return;
  }

  // A column: what is read is kept where the first stream was.
#pragma unroll 1
  for (int t = 0; t < live; ++t) {
    __nv_bfloat16* column = tile + t * values + thread;
    const float4 pre = *reinterpret_cast<const float4*>(sums.pre[t]);
    const float sum = pre.x * __bfloat162float(column[0]) + pre.y * __bfloat162float(column[columns]) +
                      (pre.z * __bfloat162float(column[2 * columns]) + pre.w * __bfloat162float(column[3 * columns]));
    const __nv_bfloat16 read = __float2bfloat16_rn(sum);
    column[0] = read;
    float squares = __bfloat162float(read) * __bfloat162float(read);
#pragma unroll
    for (int bit = kWarp / 2; bit; bit /= 2) squares += __shfl_xor_sync(~0u, squares, bit);
    if (!lane) sums.of_warps[warp][t] = squares;
  }
  ptx::sync_threads(kColumnsBarrier, columns);
  if (thread < kCluster * kTokens) {
    float sum = 0.0f;
#pragma unroll 1
    for (int w = 0; w < warps; ++w) sum += sums.of_warps[w][thread % kTokens];
    send(&sums.squares[rank][thread % kTokens], &sums.squares_arrived, sum, thread / kTokens);
  }
  const int column = rank * columns + thread;
  const float weight = __ldg(call.norm + column);
  ptx::barrier_wait(&sums.squares_arrived, 0);
#pragma unroll 1
  for (int t = 0; t < live; ++t) {
    float squares = 0.0f;
#pragma unroll 4
    for (int block = 0; block < kCluster; ++block) squares += sums.squares[block][t];
    const float read = __bfloat162float(tile[t * values + thread]);
    call.x[static_cast<int64_t>(first + t) * call.dim + column] =
        __float2bfloat16_rn(read * ptx::inverse_sqrt_fast(squares * call.of_columns + call.rms_eps) * weight);
  }
}

}  // namespace hyper_connect
}  // namespace dsv4

#endif  // DSV4_HYPER_CONNECT_KERNEL_CUH_
