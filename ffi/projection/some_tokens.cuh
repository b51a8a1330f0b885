// A product with block-scaled FP8 weights for up to 64 tokens: the codes go to the tensor cores as they are, straight
// from memory; activations are sums of two E4M3 values (cuda/split_e4m3.cuh).
#ifndef DSV4_PROJECTION_SOME_TOKENS_CUH_
#define DSV4_PROJECTION_SOME_TOKENS_CUH_

#include "cuda/split_e4m3.cuh"
#include "cuda/wgmma.cuh"
#include "projection/few_tokens.cuh"

namespace dsv4::projection {

constexpr int kSomeThreads = 256, kSomeRows = 128;
constexpr int kInsideTokens = 8;  // up to which every block splits the activations itself
constexpr int kStep = 256;        // columns of a thread's loads ahead

// A block a row of x: what it becomes, as two E4M3 codes a value, in the order and the layout in which products read
// them: for every 32 columns two pieces of `width` = 2 * places columns by 16 bytes. `inverse`: what products are to be
// multiplied by.
template <Before kBefore>
__global__ void __launch_bounds__(256) split_kernel(const Call call, int places, uint8_t* split, float* inverse) {
  __shared__ uint32_t largest_of[8];
  __shared__ float squares_of[8];
  const int t = blockIdx.x, group = blockIdx.y, width = 2 * places;
  const int64_t row = call.row_of(t, group);
  ptx::grid_launch_dependents();
  ptx::grid_wait();  // x
  uint8_t* to = split + static_cast<int64_t>(group) * call.columns * width;
  Magnitude<kBefore> magnitude;
  if (t < call.tokens) {
    for (int i = threadIdx.x; i < call.columns / 8; i += 256) magnitude.take(call, row, i);
  }
  magnitude.reduce_warp();
  if (threadIdx.x % 32 == 0)
    largest_of[threadIdx.x / 32] = magnitude.largest, squares_of[threadIdx.x / 32] = magnitude.squares;
  __syncthreads();
  magnitude = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) magnitude.add(largest_of[i], squares_of[i]);
  const float root = magnitude.root(call);
  const float power = t < call.tokens ? into_e4m3(__uint_as_float(magnitude.bits(root) << 16)) : 0.0f;
  if (threadIdx.x == 0) inverse[group * places + t] = 1.0f / power;
  for (int i = threadIdx.x; i < call.columns / 8; i += 256) {
    const uint4 v = t < call.tokens ? prepared<kBefore>(call, row, i, root) : make_uint4(0, 0, 0, 0);
    const float2 p = floats_of(v.x, __nv_bfloat16()), q = floats_of(v.y, __nv_bfloat16());
    const float2 r = floats_of(v.z, __nv_bfloat16()), s = floats_of(v.w, __nv_bfloat16());
    const uint2 first = split_four(p.x * power, p.y * power, q.x * power, q.y * power);
    const uint2 second = split_four(r.x * power, r.y * power, s.x * power, s.y * power);
    // Columns 8 i … of 64: quarter i / 2 mod 4, product i mod 2.
    uint8_t* at = to + ((i / 8 * 4 + i % 2 * 2) * width + 2 * t) * 16 + i / 2 % 4 * 4;
    *reinterpret_cast<uint32_t*>(at) = first.x;
    *reinterpret_cast<uint32_t*>(at + 16) = first.y;
    *reinterpret_cast<uint32_t*>(at + width * 16) = second.x;
    *reinterpret_cast<uint32_t*>(at + width * 16 + 16) = second.y;
  }
}

template <int kTokens>
constexpr int some_shared(int slice) {
  return slice * kTokens * 2 + kTokens * 8 + slice / kStep * 8;
}

// Grid: parts of the rows, of `row_blocks` blocks of 128 each; slices of the columns. With more than one slice sums go
// to `parts` (slices, T, rows).
template <int kTokens, Before kBefore>
__global__ void __launch_bounds__(kSomeThreads, kTokens <= kInsideTokens ? 2 : 1)
    some_tokens_kernel(const Call call, const int row_blocks, const int slice, const uint8_t* split,
                       const float* inverses, float* parts) {
  constexpr int kWidth = 2 * kTokens;
  constexpr bool kInside = kTokens <= kInsideTokens;
  extern __shared__ __align__(128) uint8_t shared[];
  float *inverse = reinterpret_cast<float*>(shared + slice * kWidth), *roots = inverse + kTokens;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, c = lane % 4;
  const int first_column = blockIdx.y * slice, steps = slice / kStep;
  const int first_block = blockIdx.x * row_blocks, blocks = min(row_blocks, call.rows / kSomeRows - first_block);
  const int group = first_block * kSomeRows / (call.rows / call.groups);

  uint4 next[2][4];
  uint32_t next_scale;
  const int own_row = threadIdx.x / 32 * 16 + lane / 4;
  const auto load = [&](int i) {
    const int column = first_column + i % steps * kStep;
    const Weight weight = call.of_row((first_block + i / steps) * kSomeRows);
    const int block = first_block + i / steps - weight.first / kSomeRows;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint8_t* from =
          weight.codes + static_cast<int64_t>(block * kSomeRows + own_row + 8 * h) * call.columns + column + c * 16;
#pragma unroll
      for (int u = 0; u < 4; ++u) next[h][u] = __ldcs(reinterpret_cast<const uint4*>(from + u * 64));
    }
    next_scale = __ldg(reinterpret_cast<const uint16_t*>(
        weight.scale + static_cast<int64_t>(block) * (call.columns / 128) + column / 128));
  };
  load(0);

  uint64_t* arrived = reinterpret_cast<uint64_t*>(roots + kTokens);
  if (threadIdx.x == 0) {
    for (int i = 0; i < steps; ++i) ptx::barrier_init(arrived + i, 1);
    ptx::fence_barrier_init();
  }
  if constexpr (kInside) {
    ptx::grid_launch_dependents();
    ptx::grid_wait();  // x
                       // Largest magnitudes of the slice, then its values in the order of the codes.
#pragma unroll 2
    for (int t = warp; t < kTokens; t += 8) {
      Magnitude<kBefore> magnitude;
      if (t < call.tokens) {
        // A norm is of the whole row.
        const int first = kBefore == Before::kNorm ? 0 : first_column / 8;
        const int last = kBefore == Before::kNorm ? call.columns / 8 : (first_column + slice) / 8;
#pragma unroll 4
        for (int i = first + lane; i < last; i += 32) magnitude.take(call, call.row_of(t, group), i);
      }
      magnitude.reduce_warp();
      const float root = magnitude.root(call);
      if (lane == 0) inverse[t] = into_e4m3(__uint_as_float(magnitude.bits(root) << 16)), roots[t] = root;
    }
    __syncthreads();
#pragma unroll 4
    for (int i = warp; i < slice / 32 * ((kTokens + 7) / 8); i += 8) {
      const int t = i % ((kTokens + 7) / 8) * 8 + lane % 8, step = i / ((kTokens + 7) / 8), quarter = lane / 8;
      if (t >= kTokens) continue;
      uint4 v = make_uint4(0, 0, 0, 0);
      if (t < call.tokens) {
        v = prepared<kBefore>(call, call.row_of(t, group), first_column / 8 + step / 2 * 8 + quarter * 2 + step % 2,
                              roots[t]);
      }
      const float power = t < call.tokens ? inverse[t] : 0.0f;
      const float2 p = floats_of(v.x, __nv_bfloat16()), q = floats_of(v.y, __nv_bfloat16());
      const float2 r = floats_of(v.z, __nv_bfloat16()), s = floats_of(v.w, __nv_bfloat16());
      const uint2 first = split_four(p.x * power, p.y * power, q.x * power, q.y * power);
      const uint2 second = split_four(r.x * power, r.y * power, s.x * power, s.y * power);
      uint8_t* to = shared + (step * 2 * kWidth + 2 * t) * 16 + quarter * 4;
      *reinterpret_cast<uint32_t*>(to) = first.x;
      *reinterpret_cast<uint32_t*>(to + 16) = first.y;
      *reinterpret_cast<uint32_t*>(to + kWidth * 16) = second.x;
      *reinterpret_cast<uint32_t*>(to + kWidth * 16 + 16) = second.y;
    }
    ptx::fence_shared_proxy();
    __syncthreads();
    if (threadIdx.x < kTokens) inverse[threadIdx.x] = 1.0f / inverse[threadIdx.x];
    __syncthreads();
  } else {
    ptx::grid_wait();
    ptx::grid_launch_dependents();
    if (threadIdx.x < kTokens) inverse[threadIdx.x] = inverses[group * kTokens + threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint8_t* from = split + (static_cast<int64_t>(group) * call.columns + first_column) * kWidth;
      for (int i = 0; i < steps; ++i) {
        ptx::barrier_arrive_expect(arrived + i, kStep * kWidth);
        ptx::copy_bulk(shared + i * kStep * kWidth, from + i * kStep * kWidth, kStep * kWidth, arrived + i);
      }
    }
  }

  float sum[2][kTokens / 4] = {};
  for (int i = 0; i < blocks * steps; ++i) {
    uint4 q[2][4];
#pragma unroll
    for (int u = 0; u < 4; ++u) q[0][u] = next[0][u], q[1][u] = next[1][u];
    const uint32_t scales = next_scale;
    if (i + 1 < blocks * steps) load(i + 1);
    if (!kInside && i < steps) ptx::barrier_wait(arrived + i, 0);
    const ptx::PieceDescriptors<kWidth * 16> descriptors(ptx::shared_address(shared) +
                                                         i % steps * (kStep / 32) * 2 * kWidth * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float d[kWidth / 2];
      uint32_t a[4][4];
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint4 x = q[0][half * 2 + k], y = q[1][half * 2 + k];
        a[2 * k][0] = x.x, a[2 * k][1] = y.x, a[2 * k][2] = x.y, a[2 * k][3] = y.y;
        a[2 * k + 1][0] = x.z, a[2 * k + 1][1] = y.z, a[2 * k + 1][2] = x.w, a[2 * k + 1][3] = y.w;
      }
      ptx::products_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_e4m3<kWidth>(d, a[k], descriptors.at((half * 4 + k) * 2 * kWidth * 16), k > 0);
      }
      ptx::products_commit();
      ptx::products_wait<0>();
      const float scale = __uint_as_float((scales >> (8 * half) & 0xFF) << 23);
#pragma unroll
      for (int j = 0; j < kTokens / 4; ++j) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum[h][j] += (d[4 * j + 2 * h] + d[4 * j + 2 * h + 1]) * scale;
        }
      }
    }
    if (i % steps == steps - 1) {
      const int first_row = (first_block + i / steps) * kSomeRows;
      const Weight weight = call.of_row(first_row);
#pragma unroll
      for (int j = 0; j < kTokens / 4; ++j) {
        const int t = j * 4 + c;
        if (t < call.tokens) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float y = sum[h][j] * inverse[t];
            const int row = first_row + own_row + 8 * h;
            if (gridDim.y == 1) {
              weight.y[static_cast<int64_t>(t) * weight.rows + row - weight.first] = __float2bfloat16_rn(y);
            } else {
              parts[(static_cast<int64_t>(blockIdx.y) * call.tokens + t) * call.rows + row] = y;
            }
          }
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) sum[h][j] = 0;
      }
    }
  }
}

__global__ void __launch_bounds__(256) sum_parts_kernel(const Call call, const float* parts, int number) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
  const int64_t size = static_cast<int64_t>(call.tokens) * call.rows;
  if (at >= size) return;
  const int token = static_cast<int>(at / call.rows), row = static_cast<int>(at % call.rows);
  const Weight weight = call.of_row(row);
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int i = 0; i < number; ++i) {
    const float4 v = *reinterpret_cast<const float4*>(parts + i * size + at);
    sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
  }
  __nv_bfloat162* to =
      reinterpret_cast<__nv_bfloat162*>(weight.y + static_cast<int64_t>(token) * weight.rows + row - weight.first);
  to[0] = __floats2bfloat162_rn(sum.x, sum.y);
  to[1] = __floats2bfloat162_rn(sum.z, sum.w);
}

}  // namespace dsv4::projection

#endif  // DSV4_PROJECTION_SOME_TOKENS_CUH_
