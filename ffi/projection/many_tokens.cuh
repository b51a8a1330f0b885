// A product with block-scaled FP8 weights for more than a few tokens (cuda/weight_product.cuh).
#ifndef DSV4_PROJECTION_MANY_TOKENS_CUH_
#define DSV4_PROJECTION_MANY_TOKENS_CUH_

#include "cuda/weight_product.cuh"
#include "projection/few_tokens.cuh"

namespace dsv4::projection {

constexpr int kManyRows = 256;  // of a block

// Grid: blocks of rows, parts of the columns, pieces of kTokens tokens. With more than one part sums go to `parts`
// (parts, T, rows), to be added up by sum_parts_kernel.
template <int kTokens>
__global__ void __launch_bounds__(kProductThreads, 1)
    many_tokens_kernel(const Call call, const __half* packed, const float* inverse, float* parts) {
  extern __shared__ __align__(128) uint8_t shared[];
  int* rows = reinterpret_cast<int*>(shared + kProductShared<kTokens>);
  const int first_token = blockIdx.z * kTokens, group = blockIdx.x * kManyRows / (call.rows / call.groups);
  for (int i = threadIdx.x; i < kTokens; i += kProductThreads) {
    rows[i] = first_token + i < call.tokens ? (first_token + i) * call.groups + group : -1;
  }
  __syncthreads();
  const int all_chunks = call.columns / kChunk;
  const int first_chunk = all_chunks * blockIdx.y / gridDim.y, last_chunk = all_chunks * (blockIdx.y + 1) / gridDim.y;
  const int lane = threadIdx.x % 32, first_row = blockIdx.x * kManyRows + threadIdx.x / 128 * 128;
  WeightTile tiles[2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
    tiles[t].init(call.weights[0].codes, call.weights[0].scale, first_row + t * 64, call.columns, first_chunk,
                  last_chunk);
  }
  float sum[2][kTokens / 2];
  multiply_tiles<kTokens>(tiles, packed + first_chunk * kChunk, call.columns, last_chunk - first_chunk, rows, shared,
                          sum);
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + t * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * h;
      const float factor = tiles[t].factor(h);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = j * 8 + lane % 4 * 2 + i;
          if (first_token + token >= call.tokens) continue;
          const float y = sum[t][4 * j + 2 * h + i] * factor * inverse[rows[token]];
          const int64_t at = static_cast<int64_t>(first_token + token) * call.rows + row;
          if (gridDim.y == 1) {
            call.weights[0].y[at] = __float2bfloat16_rn(y);
          } else {
            parts[static_cast<int64_t>(blockIdx.y) * call.tokens * call.rows + at] = y;
          }
        }
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

#endif  // DSV4_PROJECTION_MANY_TOKENS_CUH_
