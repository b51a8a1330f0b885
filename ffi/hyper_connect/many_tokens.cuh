// Many tokens through a hyper-connection, 16 to a thread block. A warp updates 32 columns of all streams at a time and
// multiplies them on the tensor cores with `fn`, as the sum of three bfloat16 values; then a warp has a token each and
// reads its streams again. Contract: dsv4_jax/ops/nn/hyper_connect.py.
#ifndef DSV4_HYPER_CONNECT_MANY_TOKENS_CUH_
#define DSV4_HYPER_CONNECT_MANY_TOKENS_CUH_

#include "hyper_connect/kernel.cuh"

namespace dsv4 {
namespace hyper_connect {

constexpr int kManyTokens = 16, kManyThreads = kManyTokens * kWarp;
constexpr int kColumnsAtOnce = 32;  // of a warp, eight of a thread

struct ManyShared {
  float4 post[kManyTokens], comb[kManyTokens][kStreams];
  alignas(16) float logits[kManyTokens][kStreams * kStreams];
  // Then, first sums (kManyTokens warps, kManyTokens, kSumsPitch), and later what is read (kManyTokens, dim).
};
constexpr int kSumsPitch = 28;

inline int many_shared(int dim) {
  return static_cast<int>(sizeof(ManyShared)) + max(kManyTokens * dim * 2, kManyTokens * kManyTokens * kSumsPitch * 4);
}

__device__ __forceinline__ float2 pair_of(uint32_t packed) {
  return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u));
}
// A pair as bfloat16; what its rounding left out stays in `rest`.
__device__ __forceinline__ uint32_t take_bfloats(float2& rest) {
  const uint32_t packed = ptx::bfloat_pair(rest.x, rest.y);
  const float2 taken = pair_of(packed);
  rest.x -= taken.x, rest.y -= taken.y;
  return packed;
}

// kTiles: of eight rows of `fn`.
template <int kTiles>
__global__ void __launch_bounds__(kManyThreads, 1) many_tokens_kernel(const __grid_constant__ Call call) {
  extern __shared__ __align__(128) uint8_t bytes[];
  ManyShared& shared = *reinterpret_cast<ManyShared*>(bytes);
  float* sums = reinterpret_cast<float*>(bytes + sizeof(ManyShared));
  uint4* reads = reinterpret_cast<uint4*>(bytes + sizeof(ManyShared));
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, c = lane % 4;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kManyTokens;
  const int live = static_cast<int>(min(static_cast<int64_t>(kManyTokens), call.tokens - first));
  if (call.output && threadIdx.x < kManyTokens * 5) {
    const int t = threadIdx.x / 5, part = threadIdx.x % 5;
    const int64_t token = first + min(t, live - 1);
    if (part == kStreams) {
      shared.post[t] = __ldg(reinterpret_cast<const float4*>(call.old_post) + token);
    } else {
      shared.comb[t][part] = __ldg(reinterpret_cast<const float4*>(call.old_comb) + token * kStreams + part);
    }
  }
  __syncthreads();

  float d[kTiles][4] = {}, of_streams[2] = {};
#pragma unroll 1
  for (int unit = warp; unit < call.dim / kColumnsAtOnce; unit += kManyTokens) {
    const int column = unit * kColumnsAtOnce + c * 8;
    // Tokens g and g + 8; of each stream eight columns.
    uint32_t v[2][kStreams][4], out[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t token = first + min(g + 8 * h, live - 1);
      const auto load = [&](const __nv_bfloat16* from, uint32_t (&to)[4]) {
        const uint4 q = __ldcs(reinterpret_cast<const uint4*>(from + column));
        to[0] = q.x, to[1] = q.y, to[2] = q.z, to[3] = q.w;
      };
#pragma unroll
      for (int j = 0; j < kStreams; ++j) load(call.streams + (token * kStreams + j) * call.dim, v[h][j]);
      if (!call.output) continue;
      load(call.output + token * call.dim, out[h]);
      if (call.extra) {
        uint32_t extra[4];
        load(call.extra + token * call.dim, extra);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 a = pair_of(out[h][w]), b = pair_of(extra[w]);
          out[h][w] = ptx::bfloat_pair(a.x + b.x, a.y + b.y);
        }
      }
    }
    if (call.output) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int t = g + 8 * h;
        const float4 post = shared.post[t];
        float4 comb[kStreams];
#pragma unroll
        for (int j = 0; j < kStreams; ++j) comb[j] = shared.comb[t][j];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 o = pair_of(out[h][w]);
          float2 old[kStreams];
#pragma unroll
          for (int j = 0; j < kStreams; ++j) old[j] = pair_of(v[h][j][w]);
          const auto mixed = [&](float of_out, float a, float b, float c, float d) {
            float2 sum = make_float2(of_out * o.x, of_out * o.y);
            sum.x += a * old[0].x, sum.y += a * old[0].y, sum.x += b * old[1].x, sum.y += b * old[1].y;
            sum.x += c * old[2].x, sum.y += c * old[2].y, sum.x += d * old[3].x, sum.y += d * old[3].y;
            return ptx::bfloat_pair(sum.x, sum.y);
          };
          v[h][0][w] = mixed(post.x, comb[0].x, comb[1].x, comb[2].x, comb[3].x);
          v[h][1][w] = mixed(post.y, comb[0].y, comb[1].y, comb[2].y, comb[3].y);
          v[h][2][w] = mixed(post.z, comb[0].z, comb[1].z, comb[2].z, comb[3].z);
          v[h][3][w] = mixed(post.w, comb[0].w, comb[1].w, comb[2].w, comb[3].w);
        }
        if (t < live) {
          __nv_bfloat16* to = call.new_streams + (first + t) * kStreams * call.dim + column;
#pragma unroll
          for (int k = 0; k < kStreams; ++k)
            *reinterpret_cast<uint4*>(to + k * call.dim) = make_uint4(v[h][k][0], v[h][k][1], v[h][k][2], v[h][k][3]);
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kStreams; ++k) {
      float4 weights[kTiles][2];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int row = tile * 8 + g;
        const float4* from = reinterpret_cast<const float4*>(
            call.fn + (static_cast<int64_t>(min(row, call.rows - 1)) * kStreams + k) * call.dim + column);
        weights[tile][0] = __ldg(from), weights[tile][1] = __ldg(from + 1);
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const float2 p = pair_of(v[h][k][w]);
          of_streams[h] = fmaf(p.x, p.x, fmaf(p.y, p.y, of_streams[h]));
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // Columns 0 to 3 of a thread's eight, then 4 to 7.
        const uint4 a = make_uint4(v[0][k][2 * half], v[1][k][2 * half], v[0][k][2 * half + 1], v[1][k][2 * half + 1]);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const float4 w = weights[tile][half];
          float2 low = make_float2(w.x, w.y), high = make_float2(w.z, w.w);
#pragma unroll
          for (int term = 0; term < 3; ++term) {
            const uint32_t b0 = take_bfloats(low), b1 = take_bfloats(high);
            ptx::product_of_warp_bf16(d[tile], a, b0, b1);
          }
        }
      }
    }
  }
  float* own = sums + warp * kManyTokens * kSumsPitch;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = own + (g + 8 * h) * kSumsPitch;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
      to[tile * 8 + c * 2] = d[tile][2 * h], to[tile * 8 + c * 2 + 1] = d[tile][2 * h + 1];
    of_streams[h] += __shfl_xor_sync(~0u, of_streams[h], 1);
    of_streams[h] += __shfl_xor_sync(~0u, of_streams[h], 2);
    if (c == 0) to[kSquares] = of_streams[h];
  }
  __syncthreads();

  float4 pre = {};
  if (warp < live) {
    float mix = 0.0f;
    if (lane <= kSquares) {
#pragma unroll
      for (int w = 0; w < kManyTokens; ++w) mix += sums[(w * kManyTokens + warp) * kSumsPitch + lane];
    }
    const float all = __shfl_sync(~0u, mix, kSquares);
    float sigma = 0.0f;
    if (lane < call.rows) {
      mix *= ptx::inverse_sqrt_fast(all * call.of_values + call.rms_eps);
      const int part = min(lane / kStreams, 2);
      const float value = fmaf(mix, __ldg(call.scale + part), __ldg(call.base + lane));
      sigma = sigmoid(value);
      if (part == 1) call.post[(first + warp) * kStreams + lane - kStreams] = 2.0f * sigma;
      if (part == 2) shared.logits[warp][lane - 2 * kStreams] = value;
    }
    sigma += call.hc_eps;
    pre = make_float4(__shfl_sync(~0u, sigma, 0), __shfl_sync(~0u, sigma, 1), __shfl_sync(~0u, sigma, 2),
                      __shfl_sync(~0u, sigma, 3));
  }
  __syncthreads();
  if (warp >= live) return;

  // A warp's token. What it reads was written by other threads of the block.
  const uint4* from = reinterpret_cast<const uint4*>((call.output ? call.new_streams : call.streams) +
                                                     (first + warp) * kStreams * call.dim);
  uint4* row_of_reads = reads + warp * (call.dim / 8);
  float squares = 0.0f;
#pragma unroll 2
  for (int i = lane; i < call.dim / 8; i += kWarp) {
    uint4 q[kStreams];
#pragma unroll
    for (int j = 0; j < kStreams; ++j) q[j] = __ldcg(from + j * (call.dim / 8) + i);
    const auto read = [&](uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
      const float2 p = pair_of(a), q = pair_of(b), r = pair_of(c), s = pair_of(d);
      const uint32_t packed = ptx::bfloat_pair(pre.x * p.x + pre.y * q.x + (pre.z * r.x + pre.w * s.x),
                                               pre.x * p.y + pre.y * q.y + (pre.z * r.y + pre.w * s.y));
      const float2 rounded = pair_of(packed);
      squares = fmaf(rounded.x, rounded.x, fmaf(rounded.y, rounded.y, squares));
      return packed;
    };
    row_of_reads[i] = make_uint4(read(q[0].x, q[1].x, q[2].x, q[3].x), read(q[0].y, q[1].y, q[2].y, q[3].y),
                                 read(q[0].z, q[1].z, q[2].z, q[3].z), read(q[0].w, q[1].w, q[2].w, q[3].w));
  }
#pragma unroll
  for (int bit = kWarp / 2; bit; bit /= 2) squares += __shfl_xor_sync(~0u, squares, bit);
  const float scale = ptx::inverse_sqrt_fast(squares * call.of_columns + call.rms_eps);
  uint4* to = reinterpret_cast<uint4*>(call.x + (first + warp) * call.dim);
#pragma unroll 2
  for (int i = lane; i < call.dim / 8; i += kWarp) {
    const uint4 q = row_of_reads[i];  // of this very thread
    const float4* norm = reinterpret_cast<const float4*>(call.norm) + 2 * i;
    const float4 m = __ldg(norm), n = __ldg(norm + 1);
    const auto normed = [scale](uint32_t packed, float low, float high) {
      const float2 p = pair_of(packed);
      return ptx::bfloat_pair(p.x * scale * low, p.y * scale * high);
    };
    to[i] = make_uint4(normed(q.x, m.x, m.y), normed(q.y, m.z, m.w), normed(q.z, n.x, n.y), normed(q.w, n.z, n.w));
  }
  if (call.comb && !lane)
    mixing_matrix(shared.logits[warp], call.iterations, call.hc_eps, call.comb + (first + warp) * kStreams * kStreams);
}

}  // namespace hyper_connect
}  // namespace dsv4

#endif  // DSV4_HYPER_CONNECT_MANY_TOKENS_CUH_
