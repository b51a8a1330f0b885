// Routed experts of many tokens: wgmma over up to 128 tokens of an expert at a time (cuda/weight_product.cuh).
#ifndef DSV4_EXPERTS_MANY_TOKENS_CUH_
#define DSV4_EXPERTS_MANY_TOKENS_CUH_

#include "cuda/weight_product.cuh"
#include "experts/routes.cuh"

namespace dsv4::experts {

constexpr int kManyTile = 128;  // tokens of a product

struct ManyCall {
  Call call;             // `inner` is packed, and `routes` is there
  const __half* packed;  // (T, hidden)
  const float* inverse;  // (T)
};

constexpr int kManyShared = kProductShared<Codes::kE2M1, kManyTile> + 3 * kManyTile * 4;

// What a block works on: 128 rows of gate and up (or 256 of down) for one piece of an expert's tokens.
struct Piece {
  int expert, begin, count, row_block;
};
__device__ __forceinline__ Piece piece_of(const Routes& routes, int item, int row_blocks) {
  const int tile = item / row_blocks, slot = routes.tiles[1 + 2 * tile], first = routes.tiles[2 + 2 * tile];
  const int begin = routes.begin[slot] + first;
  return {routes.expert[slot], begin, min(kManyTile, routes.begin[slot + 1] - begin), item % row_blocks};
}

template <int kTokens>
struct GateUpPiece {
  __device__ static void run(const ManyCall& many, const Piece& piece, uint8_t* shared, const int* rows,
                             const float* inverse, const int* entries) {
    const Call& call = many.call;
    const int lane = threadIdx.x % 32, c = lane % 4, group = threadIdx.x / 128;
    WeightTile<Codes::kE2M1> tiles[2];
    const int64_t first = static_cast<int64_t>(piece.expert) * call.inner_size + piece.row_block * 128 + group * 64;
    tiles[0].init(call.w1.codes, call.w1.scale, first, call.hidden, 0, call.hidden / kChunk);
    tiles[1].init(call.w3.codes, call.w3.scale, first, call.hidden, 0, call.hidden / kChunk);
    float sum[2][kTokens / 2];
    multiply_tiles<Codes::kE2M1, kTokens>(tiles, many.packed, call.hidden, call.hidden / kChunk, rows, shared, sum);
    // Through shared memory, so that a token's 128 values leave together.
    constexpr int kPitch = 128 + 8;
    __half* out = reinterpret_cast<__half*>(shared);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int place = packed_place<Codes::kE2M1>(threadIdx.x / 32 * 16 + lane / 4 + 8 * h);
      const float gate_factor = tiles[0].factor(h), up_factor = tiles[1].factor(h);
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = j * 8 + c * 2 + i;
          const float gate = sum[0][4 * j + 2 * h + i] * gate_factor * inverse[token];
          const float up = sum[1][4 * j + 2 * h + i] * up_factor * inverse[token];
          out[token * kPitch + place] = __float2half_rn(swiglu(gate, up, call.limit) * call.inner_scale);
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < piece.count * 16; i += kProductThreads) {
      const int token = i / 16;
      *reinterpret_cast<uint4*>(call.inner + static_cast<int64_t>(entries[token]) * call.inner_size +
                                piece.row_block * 128 + i % 16 * 8) =
          *reinterpret_cast<const uint4*>(out + token * kPitch + i % 16 * 8);
    }
  }
};

template <int kTokens>
struct DownPiece {
  __device__ static void run(const ManyCall& many, const Piece& piece, uint8_t* shared, const int* rows,
                             const float* weights, const int* entries) {
    const Call& call = many.call;
    const int lane = threadIdx.x % 32, c = lane % 4, group = threadIdx.x / 128;
    WeightTile<Codes::kE2M1> tiles[2];
    const int first = piece.row_block * 256 + group * 128;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      tiles[t].init(call.w2.codes, call.w2.scale, static_cast<int64_t>(piece.expert) * call.hidden + first + t * 64,
                    call.inner_size, 0, call.inner_size / kChunk);
    }
    float sum[2][kTokens / 2];
    multiply_tiles<Codes::kE2M1, kTokens>(tiles, call.inner, call.inner_size, call.inner_size / kChunk, rows, shared,
                                          sum);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = first + t * 64 + threadIdx.x % 128 / 32 * 16 + lane / 4 + 8 * h;
        const float factor = tiles[t].factor(h);
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int token = j * 8 + c * 2 + i;
            if (token < piece.count) {
              call.each[static_cast<int64_t>(entries[token]) * call.hidden + row] =
                  sum[t][4 * j + 2 * h + i] * factor * weights[token];
            }
          }
        }
      }
    }
  }
};

template <template <int> class P, bool kDown>
__global__ void __launch_bounds__(kProductThreads, 1) many_tokens_kernel(const ManyCall many) {
  extern __shared__ __align__(128) uint8_t shared[];
  int* rows = reinterpret_cast<int*>(shared + kProductShared<Codes::kE2M1, kManyTile>);
  int* entries = rows + kManyTile;
  float* factors = reinterpret_cast<float*>(entries + kManyTile);
  const Call& call = many.call;
  const int row_blocks = kDown ? call.hidden / 256 : call.inner_size / 128;
  const int total = call.routes.tiles[0] * row_blocks;
  for (int item = blockIdx.x; item < total; item += gridDim.x) {
    const Piece piece = piece_of(call.routes, item, row_blocks);
    __syncthreads();
    if (threadIdx.x < kManyTile) {
      const bool exists = static_cast<int>(threadIdx.x) < piece.count;
      const int entry = exists ? call.routes.list[piece.begin + threadIdx.x] : -1;
      entries[threadIdx.x] = entry;
      rows[threadIdx.x] = kDown || !exists ? entry : entry / call.k;
      factors[threadIdx.x] = !exists ? 0.0f
                             : kDown ? call.weights[entry] / call.inner_scale
                                     : many.inverse[entry / call.k];
    }
    __syncthreads();
    if (piece.count <= 32) {
      P<32>::run(many, piece, shared, rows, factors, entries);
    } else if (piece.count <= 64) {
      P<64>::run(many, piece, shared, rows, factors, entries);
    } else if (piece.count <= 96) {
      P<96>::run(many, piece, shared, rows, factors, entries);
    } else {
      P<128>::run(many, piece, shared, rows, factors, entries);
    }
  }
}

}  // namespace dsv4::experts

#endif  // DSV4_EXPERTS_MANY_TOKENS_CUH_
