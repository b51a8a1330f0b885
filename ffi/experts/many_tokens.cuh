// Routed experts of many tokens: wgmma of weights, converted in registers, with up to 112 tokens of an expert at a
// time.
//
// A piece of an expert's tokens is an image in memory, as shared memory takes it: for every 64 columns units of 8
// columns by all its tokens, in the order in which threads hold weights. One thread copies what it needs of it, ahead
// of two warpgroups; each of these has two tiles of 64 weight rows, takes their codes from memory to registers, and
// waits for nothing but its own products. Gate and up leave an image for down.
#ifndef DSV4_EXPERTS_MANY_TOKENS_CUH_
#define DSV4_EXPERTS_MANY_TOKENS_CUH_

#include <type_traits>

#include "cuda/weight_mma.cuh"
#include "cuda/wgmma.cuh"
#include "experts/routes.cuh"

namespace dsv4::experts {

constexpr int kManyTile = 112;      // tokens of a piece at most: 128 take more registers than there are
constexpr int kCodesColumns = 128;  // of a row, 16 bytes in each of four threads
constexpr int kStageWidth = 64;     // columns of a stage of activations
constexpr int kImageStage = kManyTile * kStageWidth * 2;
constexpr int kItemRows = 256;  // weight rows of a block: of down, or half of gate and half of up
constexpr int kManyConsumers = 256, kManyThreads = kManyConsumers + 128;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kMostManyShared = 232448;

// Some of an expert's tokens. They have `width` places from `first` on, of which `count` are taken.
struct Piece {
  int expert, first, count, width;
};

struct ManyCall {
  Call call;
  const int32_t* totals;  // pieces, places
  const Piece* pieces;
  const int32_t* entries;  // of a place: token * k + pick, or -1
  const float* inverse;    // of a place: what products with its activations are to be multiplied by
  const float* shares;     // of a place: its weight, by what multiplies `inner_images`
  uint8_t* images;         // of the tokens
  uint8_t* inner_images;   // of what gate and up give
};

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

// Tokens of a product that a piece of so many takes.
__host__ __device__ constexpr int width_of(int count) {
  return count <= 32 ? 32 : count <= 96 ? (count + 31) / 32 * 32 : (count + 15) / 16 * 16;
}

// Bounds for so many (token, pick).
inline int64_t most_pieces(int64_t entries, int64_t experts) {
  return (entries < experts ? entries : experts) + entries / kManyTile;
}
inline int64_t most_places(int64_t entries, int64_t experts) { return entries + 32 * most_pieces(entries, experts); }

// Groups (token, pick) by expert, in one block: pieces of about the same size, and a place for each.
// Dynamic shared memory: 4 * experts ints.
__global__ void __launch_bounds__(1024) plan_kernel(const int32_t* picks, int number, int experts, int32_t* totals,
                                                    Piece* pieces, int32_t* piece_of, int32_t* entries) {
  extern __shared__ int32_t counts[];
  int32_t *first_place = counts + experts, *size_of = first_place + experts, *taken = size_of + experts;
  __shared__ int32_t places;
  for (int e = threadIdx.x; e < experts; e += 1024) counts[e] = 0, taken[e] = 0;
  __syncthreads();
#pragma unroll 8
  for (int i = threadIdx.x; i < number; i += 1024) {
    const int e = picks[i];
    if (e >= 0 && e < experts) atomicAdd(counts + e, 1);
  }
  __syncthreads();
  if (threadIdx.x < 32) {  // experts in chunks of 32
    const int lane = threadIdx.x;
    int all_pieces = 0, all_places = 0;
    for (int first = 0; first < experts; first += 32) {
      const int e = first + lane, count = e < experts ? counts[e] : 0;
      const int own = (count + kManyTile - 1) / kManyTile, size = own ? (count + own - 1) / own : 1;
      const int width = width_of(size);
      int piece = own, place = own * width;
      for (int d = 1; d < 32; d *= 2) {
        const int p = __shfl_up_sync(0xFFFFFFFFu, piece, d), q = __shfl_up_sync(0xFFFFFFFFu, place, d);
        if (lane >= d) piece += p, place += q;
      }
      const int begin = all_places + place - own * width;
      for (int i = 0; i < own; ++i) {
        pieces[all_pieces + piece - own + i] = {e, begin + i * width, min(size, count - i * size), width};
        for (int j = 0; j < width / 16; ++j) piece_of[(begin + i * width) / 16 + j] = all_pieces + piece - own + i;
      }
      if (e < experts) first_place[e] = begin, size_of[e] = size;
      all_pieces += __shfl_sync(0xFFFFFFFFu, piece, 31);
      all_places += __shfl_sync(0xFFFFFFFFu, place, 31);
    }
    if (lane == 0) totals[0] = all_pieces, totals[1] = places = all_places;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < places; i += 1024) entries[i] = -1;
  __syncthreads();
#pragma unroll 8
  for (int i = threadIdx.x; i < number; i += 1024) {
    const int e = picks[i];
    if (e < 0 || e >= experts) continue;
    const int at = atomicAdd(taken + e, 1), size = size_of[e];
    entries[first_place[e] + at / size * width_of(size) + at % size] = i;
  }
}

// Where a unit of 8 columns of a place is in an image of so many columns.
__device__ __forceinline__ int64_t unit_offset(const Piece& piece, int columns, int unit, int place) {
  return static_cast<int64_t>(piece.first) * columns * 2 +
         (static_cast<int64_t>(unit) * piece.width + place - piece.first) * 16;
}

// A block puts eight places' tokens into their images: halves, each token times a power of two of its own.
__global__ void __launch_bounds__(256)
    image_kernel(const __nv_bfloat16* x, int k, int columns, const int32_t* totals, const Piece* pieces,
                 const int32_t* piece_of, const int32_t* entries, const float* weights, float inner_scale,
                 uint8_t* images, float* inverse, float* shares) {
  __shared__ float powers[8];
  __shared__ int tokens[8];
  const int first = blockIdx.x * 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (first >= totals[1]) return;
  const Piece piece = pieces[piece_of[first / 16]];
  const int entry = entries[first + warp], own = entry < 0 ? -1 : entry / k;
  uint32_t largest = 0;
  if (own >= 0) {
    const uint4* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(own) * columns);
#pragma unroll 4
    for (int i = lane; i < columns / 8; i += 32) {
      const uint4 v = __ldg(from + i);
      largest = larger_magnitudes(larger_magnitudes(largest, v.x), v.y);
      largest = larger_magnitudes(larger_magnitudes(largest, v.z), v.w);
    }
  }
  largest = __reduce_max_sync(0xFFFFFFFFu, max(largest & 0xFFFFu, largest >> 16));
  if (lane == 0) {
    tokens[warp] = own, powers[warp] = into_halves(largest);
    inverse[first + warp] = inverse_power(powers[warp]);
    shares[first + warp] = entry < 0 ? 0.0f : weights[entry] / inner_scale;
  }
  __syncthreads();
  const int t = lane / 4, c = lane % 4, token = tokens[t];
  const float power = powers[t];
#pragma unroll 4
  for (int task = warp; task < columns / 32; task += 8) {
    const int chunk = task / 4, i = task % 4;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token >= 0) {
      v = __ldg(reinterpret_cast<const uint4*>(x + static_cast<int64_t>(token) * columns + chunk * kCodesColumns +
                                               c * 32 + i * 8));
    }
    const auto low = [power](uint32_t p) { return __uint_as_float(p << 16) * power; };
    const auto high = [power](uint32_t p) { return __uint_as_float(p & 0xFFFF0000u) * power; };
    // Columns (0, 4), (2, 6), (1, 5), (3, 7), as halves_of_codes gives weights; then unit c of what four threads have.
    uint32_t w[4] = {ptx::half_pair(low(v.x), low(v.z)), ptx::half_pair(low(v.y), low(v.w)),
                     ptx::half_pair(high(v.x), high(v.z)), ptx::half_pair(high(v.y), high(v.w))};
    uint32_t a = __shfl_xor_sync(0xFFFFFFFFu, c & 1 ? w[0] : w[1], 1);
    uint32_t b = __shfl_xor_sync(0xFFFFFFFFu, c & 1 ? w[2] : w[3], 1);
    if (c & 1) {
      w[0] = a, w[2] = b;
    } else {
      w[1] = a, w[3] = b;
    }
    a = __shfl_xor_sync(0xFFFFFFFFu, c & 2 ? w[0] : w[2], 2);
    b = __shfl_xor_sync(0xFFFFFFFFu, c & 2 ? w[1] : w[3], 2);
    if (c & 2) {
      w[0] = a, w[1] = b;
    } else {
      w[2] = a, w[3] = b;
    }
    *reinterpret_cast<uint4*>(images + unit_offset(piece, columns, chunk * 16 + i * 4 + c, first + t)) =
        make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// Eight E2M1 codes as halves, in the order (0, 4), (2, 6), (1, 5), (3, 7): bits s000eem0 are the upper byte of a half
// 2^-14 times the value, subnormal or not. Times `scale`.
__device__ __forceinline__ void halves_of_codes(uint32_t codes, uint32_t scale, uint32_t (&halves)[4]) {
  const uint32_t even = ((codes << 4) & 0x80808080u) | ((codes << 1) & 0x0E0E0E0Eu);
  const uint32_t odd = (codes & 0x80808080u) | ((codes >> 3) & 0x0E0E0E0Eu);
  halves[0] = ptx::multiply_halves(__byte_perm(even, 0, 0x2404), scale);
  halves[1] = ptx::multiply_halves(even & 0xFF00FF00u, scale);
  halves[2] = ptx::multiply_halves(__byte_perm(odd, 0, 0x2404), scale);
  halves[3] = ptx::multiply_halves(odd & 0xFF00FF00u, scale);
}

// Shared memory: stages of activations, of gate and up what leaves (two stages), scales as they come, scales relative
// to their row's largest, and the largest, barriers.
template <bool kDown>
struct ManyLayout {
  int stages, scale_pitch, leaving, raw, relative, largest, barriers, bytes;

  __host__ __device__ explicit ManyLayout(int columns) {
    scale_pitch = columns / 32 + 16;
    const int fixed = (kDown ? 0 : 2 * kImageStage) + kItemRows * (columns / 32 + scale_pitch + 4) + 256;
    stages = (kMostManyShared - fixed) / kImageStage;
    if (stages > 8) stages = 8;
    leaving = stages * kImageStage;
    raw = leaving + (kDown ? 0 : 2 * kImageStage);
    relative = raw + kItemRows * (columns / 32);
    largest = relative + kItemRows * scale_pitch;
    barriers = largest + kItemRows * 4;
    bytes = barriers + (2 * stages + 2) * 8;
  }
};

// A ring of stages, of which `full` and `empty` are the first barriers.
struct Ring {
  uint32_t base, full, empty;
  int stages, stage;
  uint32_t phase;

  __device__ __forceinline__ void next() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }
};

// What a warpgroup needs to know of an item: 256 weight rows by a piece of tokens.
struct Item {
  Piece piece;
  int row_block;
};
__device__ __forceinline__ Item item_of(const ManyCall& many, int item, int row_blocks) {
  const int4 v = __ldg(reinterpret_cast<const int4*>(many.pieces) + item / row_blocks);
  return {{v.x, v.y, v.z, v.w}, item % row_blocks};
}

// Row m of tile t of a warpgroup, among the item's 256. Of gate and up a warpgroup has both of a row, and of every 32
// rows 16, so that what it gives fills units of the image for down.
template <bool kDown>
__device__ __forceinline__ int row_of(int warpgroup, int t, int m) {
  return kDown ? warpgroup * 128 + t * 64 + m : t * 128 + m / 16 * 32 + warpgroup * 16 + m % 16;
}
// Where the codes or scales (`width` bytes a row) of row r of an item are.
template <bool kDown>
__device__ __forceinline__ const uint8_t* row_at(const uint8_t* first, const uint8_t* second, const Call& call,
                                                 const Item& item, int r, int width) {
  if (kDown) return first + (static_cast<int64_t>(item.piece.expert) * call.hidden + item.row_block * 256 + r) * width;
  return (r < 128 ? first : second) +
         (static_cast<int64_t>(item.piece.expert) * call.inner_size + item.row_block * 128 + r % 128) * width;
}

// Codes of a thread's rows r and r + 8 of both tiles: 16 bytes of every 64.
struct ThreadCodes {
  const uint8_t* from[2];
  uint4 next[2][2];

  template <bool kDown>
  __device__ __forceinline__ void aim(const Call& call, const Item& item, int columns) {
    const int lane = threadIdx.x % 32, m = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      from[t] = row_at<kDown>(kDown ? call.w2.codes : call.w1.codes, call.w3.codes, call, item,
                              row_of<kDown>(threadIdx.x / 128, t, m), columns / 2) +
                lane % 4 * 16;
    }
  }
  __device__ __forceinline__ void load(int t, int columns) {
    next[t][0] = __ldg(reinterpret_cast<const uint4*>(from[t]));
    next[t][1] = __ldg(reinterpret_cast<const uint4*>(from[t] + 8 * (columns / 2)));
    from[t] += kCodesColumns / 2;
  }
};

// sum[t] = tile t times the piece, times what makes the scales relative. `relative`: of the thread's first row.
template <int kTokens, typename Aim>
__device__ __forceinline__ void multiply_piece(Ring& ring, ThreadCodes& codes, const uint8_t* relative, int pitch,
                                               int columns, const Aim& aim_at_next, float (&sum)[2][kTokens / 2]) {
  const int chunks = columns / kCodesColumns, lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) sum[t][i] = 0.0f;
  }
  constexpr int kBuffers = 2;
  uint32_t a[kBuffers][8], used[2] = {};
#pragma unroll 1
  for (int chunk = 0; chunk < chunks; ++chunk) {
    uint32_t stage[2], releases[2];
#pragma unroll
    for (int half = 0; half < 2; ++half, ring.next()) {
      ptx::barrier_wait(ring.full + ring.stage * 8, ring.phase);
      stage[half] = ring.base + ring.stage * kImageStage, releases[half] = ring.empty + ring.stage * 8;
    }
    if (chunk == chunks - 1) aim_at_next();
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      uint32_t s[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) s[h] = relative[(t * 64 + h * 8) * pitch + chunk * 4] * 0x04000400u;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t (&own)[8] = a[(t * 4 + i) % kBuffers];
        ptx::products_wait<kBuffers - 1>();                       // what used these registers is done
        if (t == 0 && i == kBuffers - 1 && chunk && lane == 0) {  // so are the stages before
          ptx::barrier_arrive(used[0]), ptx::barrier_arrive(used[1]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 q = codes.next[t][h];
          uint32_t x[4];
          halves_of_codes(i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w, s[h], x);
#pragma unroll
          for (int j = 0; j < 4; ++j) own[2 * j + h] = x[j];
        }
        if (i == 3) codes.load(t, columns);
        ptx::products_fence();
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          wgmma<kTokens>(sum[t], own + 4 * step,
                         ptx::piece_descriptor(stage[i / 2] + (i % 2 * 2 + step) * 2 * kTokens * 16, kTokens * 16));
        }
        ptx::products_commit();
      }
    }
    used[0] = releases[0], used[1] = releases[1];
  }
  ptx::products_wait<0>();
  if (lane == 0) ptx::barrier_arrive(used[0]), ptx::barrier_arrive(used[1]);
}

// What the sums of an item become.
template <bool kDown, int kTokens, typename Aim>
__device__ __forceinline__ void run_item(const ManyCall& many, const Item& item, Ring& ring, ThreadCodes& codes,
                                         const uint8_t* relative, const uint32_t* largest, int pitch, int columns,
                                         uint8_t* leaving, float* factors, int* entries, const Aim& aim_at_next) {
  const Call& call = many.call;
  const int warpgroup = threadIdx.x / 128, at = threadIdx.x % 128, lane = at % 32, warp = at / 32, c = lane % 4;
  float own_factor = 0;
  int own_entry = -1;
  if (at < kTokens) {
    if (kDown) own_entry = __ldg(many.entries + item.piece.first + at);
    own_factor = __ldg((kDown ? many.shares : many.inverse) + item.piece.first + at);
  }
  float row_factor[2][2];
#pragma unroll
  for (int t = 0; t < 2; ++t) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
      row_factor[t][h] = __uint_as_float(largest[t * 64 + warp * 16 + lane / 4 + h * 8] << 23) * 0.5f;
  }
  float sum[2][kTokens / 2];
  multiply_piece<kTokens>(ring, codes, relative, pitch, columns, aim_at_next, sum);
  factors += warpgroup * 128, entries += warpgroup * 128;
  factors[at] = own_factor;
  if (kDown) {
    entries[at] = own_entry;
  } else if (at == 0) {
    ptx::stores_wait_read();  // what left from here before has been read
  }
  ptx::sync_threads(1 + warpgroup, 128);
  if constexpr (kDown) {
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = j * 8 + c * 2 + i, entry = entries[token];
        if (entry < 0) continue;
        const float factor = factors[token];
        float* to = call.each + static_cast<int64_t>(entry) * call.hidden + item.row_block * 256 + warpgroup * 128 +
                    warp * 16 + lane / 4;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
#pragma unroll
          for (int h = 0; h < 2; ++h) to[t * 64 + h * 8] = sum[t][4 * j + 2 * h + i] * (row_factor[t][h] * factor);
        }
      }
    }
  } else {
    uint8_t* out = leaving + warpgroup * kImageStage;
    const int r = lane / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int unit = h * 4 + r % 2 * 2 + r / 2 % 2;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        float v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float factor = factors[j * 8 + c * 2 + i];
          v[i] = swiglu(sum[0][4 * j + 2 * h + i] * (row_factor[0][h] * factor),
                        sum[1][4 * j + 2 * h + i] * (row_factor[1][h] * factor), call.limit) *
                 call.inner_scale;
        }
        // Rows r and r + 4 lie side by side: one of two threads has both of a token.
        const float other = __shfl_xor_sync(0xFFFFFFFFu, r < 4 ? v[1] : v[0], 16);
        const uint32_t pair = r < 4 ? ptx::half_pair(v[0], other) : ptx::half_pair(other, v[1]);
        *reinterpret_cast<uint32_t*>(out + (unit * kTokens + j * 8 + c * 2 + r / 4) * 16 + warp * 4) = pair;
      }
    }
    ptx::fence_shared_proxy();
    ptx::sync_threads(1 + warpgroup, 128);
    if (at == 0) {
      ptx::store_bulk(many.inner_images + unit_offset(item.piece, call.inner_size, (item.row_block * 2 + warpgroup) * 8,
                                                      item.piece.first),
                      ptx::shared_address(out), kTokens * 128);
    }
  }
}

template <bool kDown>
__global__ void __launch_bounds__(kManyThreads, 1) many_tokens_kernel(const ManyCall many) {
  extern __shared__ __align__(128) uint8_t shared[];
  __shared__ float factors[kManyConsumers];
  __shared__ int entries[kManyConsumers];
  const Call& call = many.call;
  const int columns = kDown ? call.inner_size : call.hidden;
  const ManyLayout<kDown> layout(columns);
  const uint32_t barriers = ptx::shared_address(shared + layout.barriers);
  const uint32_t scales_full = barriers + layout.stages * 16, scales_empty = scales_full + 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < layout.stages; ++i) {
      ptx::barrier_init(barriers + i * 8, 1),
          ptx::barrier_init(barriers + (layout.stages + i) * 8, kManyConsumers / 32);
    }
    ptx::barrier_init(scales_full, 1), ptx::barrier_init(scales_empty, kManyConsumers / 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  Ring ring = {ptx::shared_address(shared), barriers, barriers + layout.stages * 8, layout.stages, 0, 0};
  const int row_blocks = kDown ? call.hidden / 256 : call.inner_size / 128;
  const int total = many.totals[0] * row_blocks, lane = threadIdx.x % 32, scale_width = columns / 32;
  const uint8_t *first_scale = kDown ? call.w2.scale : call.w1.scale, *second_scale = call.w3.scale;
  uint32_t scales_phase = 0;

  if (threadIdx.x >= kManyConsumers) {
    ptx::fewer_registers<kProducerRegisters>();
    if (threadIdx.x >= kManyConsumers + 32) return;
    for (int number = blockIdx.x; number < total; number += gridDim.x, scales_phase ^= 1) {
      const Item item = item_of(many, number, row_blocks);
      ptx::barrier_wait(scales_empty, scales_phase ^ 1);
      if (lane == 0) {
        ptx::barrier_arrive_expect(scales_full, kItemRows * scale_width);
        for (int r = 0; r < kItemRows; r += 128) {
          ptx::copy_bulk(ptx::shared_address(shared + layout.raw + r * scale_width),
                         row_at<kDown>(first_scale, second_scale, call, item, r, scale_width), 128 * scale_width,
                         scales_full);
        }
      }
      const uint8_t* image =
          (kDown ? many.inner_images : many.images) + unit_offset(item.piece, columns, 0, item.piece.first);
      const int bytes = item.piece.width * kStageWidth * 2;
      for (int stage = 0; stage < columns / kStageWidth; ++stage, ring.next()) {
        ptx::barrier_wait(ring.empty + ring.stage * 8, ring.phase ^ 1);
        if (lane == 0) {
          ptx::barrier_arrive_expect(ring.full + ring.stage * 8, bytes);
          ptx::copy_bulk(ring.base + ring.stage * kImageStage, image + stage * bytes, bytes,
                         ring.full + ring.stage * 8);
        }
        if (stage % 4 == 0) {  // the codes of 256 columns, into the L2
#pragma unroll 1
          for (int r = lane; r < kItemRows; r += 32) {
            ptx::prefetch_l2(
                row_at<kDown>(kDown ? call.w2.codes : call.w1.codes, call.w3.codes, call, item, r, columns / 2) +
                stage * (kStageWidth / 2));
          }
        }
      }
    }
  } else {
    ptx::more_registers<kConsumerRegisters>();
    const int warpgroup = threadIdx.x / 128, at = threadIdx.x % 128, pitch = layout.scale_pitch;
    uint8_t* own_scales = shared + layout.relative + warpgroup * 128 * pitch;
    uint32_t* largest_of = reinterpret_cast<uint32_t*>(shared + layout.largest) + warpgroup * 128;
    const uint8_t* relative = own_scales + (at / 32 * 16 + lane / 4) * pitch + lane % 4;
    int number = blockIdx.x;
    Item item = number < total ? item_of(many, number, row_blocks) : Item();
    ThreadCodes codes;
    if (number < total) {
      codes.aim<kDown>(call, item, columns);
      codes.load(0, columns), codes.load(1, columns);
    }
    while (number < total) {
      // The scales of a row, relative to its largest: a row a thread.
      ptx::barrier_wait(scales_full, scales_phase);
      scales_phase ^= 1;
      {
        const int r = row_of<kDown>(warpgroup, at / 64, at % 64), units = scale_width / 16;
        const uint4* from = reinterpret_cast<const uint4*>(shared + layout.raw + r * scale_width);
        uint4* to = reinterpret_cast<uint4*>(own_scales + at * pitch);
        uint32_t largest = 0;
#pragma unroll 4
        for (int i = 0, u = at % units; i < units; ++i, u = u + 1 == units ? 0 : u + 1)
          largest = max(largest, largest_byte(from[u]));
        largest_of[at] = largest;
        const uint32_t less = largest < 30 ? 0 : (largest - 30) * 0x01010101u,
                       more = largest < 30 ? (30 - largest) * 0x01010101u : 0;
#pragma unroll 4
        for (int i = 0, u = at % units; i < units; ++i, u = u + 1 == units ? 0 : u + 1) {
          const uint4 v = from[u];
          to[u] = make_uint4(__vsubus4(v.x, less) + more, __vsubus4(v.y, less) + more, __vsubus4(v.z, less) + more,
                             __vsubus4(v.w, less) + more);
        }
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(scales_empty);
      ptx::sync_threads(1 + warpgroup, 128);
      number += gridDim.x;
      const Item next = number < total ? item_of(many, number, row_blocks) : item;
      const auto aim_at_next = [&] { codes.aim<kDown>(call, next, columns); };
      const auto run = [&](auto tokens) {
        run_item<kDown, decltype(tokens)::value>(many, item, ring, codes, relative, largest_of, pitch, columns,
                                                 shared + layout.leaving, factors, entries, aim_at_next);
      };
      switch (item.piece.width) {
        case 32:
          run(Width<32>());
          break;
        case 64:
          run(Width<64>());
          break;
        case 96:
          run(Width<96>());
          break;
        default:
          run(Width<112>());
      }
      item = next;
    }
    if (!kDown && at == 0) ptx::stores_wait_all();
  }
}

}  // namespace dsv4::experts

#endif  // DSV4_EXPERTS_MANY_TOKENS_CUH_
