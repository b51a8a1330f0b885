// attend on Hopper (sm_90a): one thread block a token, 64 heads and a part of the rows.
//
// Records are never dequantised in memory. With k8 a row's codes, s its scale and r its RoPE half,
//   score = s (q_nope . k8) + q_rope . r,   out_nope = sum (p s) k8,   out_rope = sum p r,
// so that codes go from shared memory through registers into the tensor cores: E4M3 is exact in float16. Both products
// are transposed, rows or values by heads, because a warpgroup takes the first factor from registers.
//
// Four warpgroups. The first multiplies a block of 64 rows with the queries and takes its softmax; two hold the output,
// 256 values of 64 heads each, and multiply the block's probabilities with its values, while the first is at the next
// block; the last fetches rows. Blocks of a cluster share the rows of a token and add up in shared memory; more blocks
// than a cluster has leave their sums in global memory, where a second kernel adds them up.
#ifndef DSV4_ATTEND_SM90_CUH_
#define DSV4_ATTEND_SM90_CUH_

#include <cuda_fp16.h>

#include <type_traits>

#include "attend/op.h"
#include "cuda/geometry.cuh"
#include "cuda/group_scales.cuh"
#include "cuda/ptx.cuh"

namespace dsv4::attend_sm90 {

constexpr int kNope = V4Record::kNope, kRope = V4Record::kRope, kWidth = V4Record::kDim;
constexpr int kHeads = 64;        // of a thread block
constexpr int kRows = 64;         // of a block of rows
constexpr int kHalf = kRows / 2;  // rows are fetched and given back by halves of a block
constexpr int kPitch = 608;       // bytes of a row in shared memory: 448 + 128 and 32 against bank conflicts
constexpr int kWarpgroup = 128, kThreads = 4 * kWarpgroup;
constexpr int kConsumers = 3 * kWarpgroup;
// Registers of a thread of the first warpgroup, of the two after it, of the last: together four times 128.
constexpr int kScoreRegisters = 152, kValueRegisters = 168, kFetchRegisters = 24;
static_assert(kScoreRegisters + 2 * kValueRegisters + kFetchRegisters == 4 * 128);
constexpr int kChunks = kNope / V4Record::kGroup;
constexpr int kPartPitch = kWidth + 4;  // floats of a head's sum, when a cluster adds up
// What a thread block that lies in no cluster leaves for the second kernel, in floats: sums of 64 heads, then of these
// heads the softmax's reference and sum. Nothing is read there that was not written.
constexpr int kPartial = kHeads * kWidth + 2 * kHeads;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kRescaleAbove = 8.0f;  // a reference is kept until the maximum exceeds it by 2^8

// Halves of blocks in shared memory: while one block is at the scores, another waits for its softmax and a third is at
// the output, what is free of the third takes rows to come.
template <bool kGroups>
constexpr int kHalves = kGroups ? 6 : 7;

// What records with a scale for every 64 values need beside.
template <bool kGroups>
struct GroupScales {
  float largest[kHalves<true> * kHalf];             // of a row
  uint16_t factor[kChunks][kHalves<true> * kHalf];  // float16: scale of 64 values by the largest
};
template <>
struct GroupScales<false> {};

template <bool kGroups>
struct SharedMemory {
  using Scale = std::conditional_t<kGroups, uint64_t, float>;  // as stored
  union {
    struct {
      uint8_t q[9]
               [kHeads * 128];  // 64 values of every head, swizzled; the last two: RoPE, bfloat16, and what that lacks
      uint8_t p[kRows * 128];   // probability times scale, float16, a row of 64 heads, swizzled
      uint8_t p_rope[kRows * 128];  // probability, bfloat16
      uint8_t rows[kHalves<kGroups> * kHalf * kPitch];
    };
    float part[kHeads * kPartPitch];  // the sum of this block of a cluster
  };
  Scale scale[kHalves<kGroups> * kHalf];
  GroupScales<kGroups> groups;
  uint8_t visible[kHalves<kGroups> * kHalf];
  alignas(16) float alpha[2][kHeads];  // what the output so far is multiplied by
  float partial[4][kHeads];            // of each warp
  float reference[kHeads];             // of the block's probabilities
  float shift[kHeads];                 // by which the reference fell
  float top[kHeads], total[kHeads];    // reference and sum of the softmax
  float inverse[kHeads];               // of the sum with the sink, for a thread block alone
  int rescale[2][2], settled[2];
  uint64_t full[kHalves<kGroups>], empty[kHalves<kGroups>], p_full, p_empty, queries;
};
template <bool kGroups>
constexpr int kSharedBytes = sizeof(SharedMemory<kGroups>) + 1024;  // to begin at a multiple of 1024
static_assert(kSharedBytes<false> <= 232448 && kSharedBytes<true> <= 232448, "more than a multiprocessor has");

// Where the n-th half block of rows is, and how often its place was filled before.
template <bool kGroups>
struct Place {
  int index = 0, round = 0;
  __device__ __forceinline__ explicit Place(int n) : index(n % kHalves<kGroups>), round(n / kHalves<kGroups>) {}
  __device__ __forceinline__ void advance(int halves) {
    index += halves;
    if (index >= kHalves<kGroups>) index -= kHalves<kGroups>, ++round;
  }
};

// Rows of a thread block of 64 heads in the fragments of a product: row g of 16 lies at g with the middle bits turned,
// so that eight lanes that load together meet no bank twice.
__device__ __forceinline__ int turned(int g) { return (g & 4) | ((g >> 1) & 1) | ((g & 1) << 1); }
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t piece) {
  return row * 128 + ((piece ^ (row & 7)) << 4);
}

// What the token of a thread block sees.
struct Token {
  int32_t slot, position;
  int64_t visible;            // entries
  int32_t first_fresh;        // position of the step's first token; beyond every position without fresh rows
  const int32_t* fresh_rows;  // token index of the positions from first_fresh on
  int window_blocks, blocks;  // of 64 rows; those of the window come first
};

__device__ __forceinline__ Token token_of(const AttendCall& call, int64_t t) {
  Token token{};
  token.slot = call.slots[t], token.position = call.positions[t];
  if (!call.is_slot(token.slot) || token.position < 0) return token;
  token.first_fresh = 0x7FFFFFFF;
  if (call.has_fresh) {
    const int64_t segment = call.segment_rows[t] / call.per_segment;
    if (segment < call.num_segments) {
      token.first_fresh = call.starts[segment];
      token.fresh_rows = call.segment_tokens + segment * call.per_segment;
    }
  }
  token.window_blocks = static_cast<int>((call.window + kRows - 1) / kRows);
  token.blocks = token.window_blocks;
  if (call.has_entries) {
    token.visible = call.visible(token.position);
    const int64_t rows = call.selected ? call.chosen : token.visible;
    token.blocks += static_cast<int>((rows + kRows - 1) / kRows);
  }
  return token;
}

enum class Part { kCodes, kRope, kScale };  // of a record
__device__ __forceinline__ const uint8_t* part_at(const ReadRecords& records, int64_t index, Part part) {
  if (part == Part::kCodes) return records.nope + index * kNope;
  if (part == Part::kRope) return reinterpret_cast<const uint8_t*>(records.rope + index * kRope);
  return static_cast<const uint8_t*>(records.scale) + index * (records.scale_width ? V4Record::kScales : 4);
}

__device__ __forceinline__ uint32_t word_of(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

__device__ __forceinline__ float2 load_pair(const float* from) { return *reinterpret_cast<const float2*>(from); }
__device__ __forceinline__ float2 load_pair(const BFloat16* from) {
  const uint32_t pair = *reinterpret_cast<const uint32_t*>(from);
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

// Queries, from `from` (heads, 512): normed and rotated where they come raw, and stored in the order in which the
// fragments of rows have values. A lane has 16 values of a head, in an order of its own: so neither the loads nor the
// stores of a warp meet a bank twice.
template <bool kGroups, typename T>
__device__ __forceinline__ void take_queries(const AttendCall& call, SharedMemory<kGroups>& shared, const T* from,
                                             int64_t t, int heads) {
  const int lane = threadIdx.x % 32, chunk = lane / 4;
  const bool rope = chunk == kChunks, raw = call.cos != nullptr;
  float2 turn[8];  // cosine and sine of pair i ^ chunk
  if (raw && rope) {
    const int64_t first = t * (kRope / 2) + (lane - 4 * kChunks) * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      turn[i] = make_float2(__ldg(call.cos + first + (i ^ kChunks)), __ldg(call.sin + first + (i ^ kChunks)));
  }
  uint8_t* tile = shared.q[chunk] + 4 * (lane % 4);
#pragma unroll 2
  for (int head = threadIdx.x / 32; head < kHeads; head += kThreads / 32) {
    float2 x[8] = {};
    if (head < heads) {
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = load_pair(from + head * kWidth + lane * 16 + 2 * (i ^ chunk));
    }
    if (raw) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares = fmaf(x[i].y, x[i].y, fmaf(x[i].x, x[i].x, squares));
#pragma unroll
      for (int step = 16; step; step /= 2) squares += __shfl_xor_sync(0xFFFFFFFFu, squares, step);
      const float norm = rsqrtf(squares / kWidth + call.eps);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i].x *= norm, x[i].y *= norm;
      if (rope) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float2 v = x[i];
          x[i] = make_float2(v.x * turn[i].x - v.y * turn[i].y, v.x * turn[i].y + v.y * turn[i].x);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = rope ? ptx::bfloat_pair(x[i].x, x[i].y) : ptx::half_pair(x[i].x, x[i].y);
      const uint32_t at = swizzled(head, i ^ chunk);
      *reinterpret_cast<uint32_t*>(tile + at) = pair;
      if (rope) {
        const float low = x[i].x - __uint_as_float(pair << 16), high = x[i].y - __uint_as_float(pair & 0xFFFF0000u);
        *reinterpret_cast<uint32_t*>(tile + kHeads * 128 + at) = ptx::bfloat_pair(low, high);
      }
    }
  }
}

// The last warpgroup fetches rows, a warp eight of each half block. A lane looks up where one part of a row is: lane
// 8 part + row. That takes two loads that depend on each other, and so three steps, which a loop takes an iteration
// apart: none waits for a load.
struct Fetcher {
  static constexpr int kOwn = kHalf / 4;  // rows of a warp
  int warp, lane;
  Part part;
  const uint8_t* pool;  // this part of the pool, `size` bytes a row
  uint32_t size, inverse;

  struct Lookup {
    int32_t entry = -1;  // after the first step; after the second its row in the block
    int32_t place = -1;  // block of the pool, after the second
  };

  __device__ __forceinline__ explicit Fetcher(const AttendCall& call)
      : warp(threadIdx.x / 32 % 4), lane(threadIdx.x % 32), part(static_cast<Part>(min(lane / kOwn, 2))) {
    pool = part_at(call.pool, 0, part);
    size = static_cast<uint32_t>(part_at(call.pool, 1, part) - pool);
    inverse = call.has_entries ? 0xFFFFFFFFu / static_cast<uint32_t>(call.per_block) : 0;
  }

  // A row of the n-th half block, counted over all blocks.
  __device__ __forceinline__ int row_of(int n) const { return n * kHalf + kOwn * warp + lane % kOwn; }
  __device__ __forceinline__ Lookup look(const AttendCall& call, const Token& token, int64_t t, int n) const {
    Lookup lookup;
    const int i = row_of(n) - token.window_blocks * kRows;
    if (i < 0 || i >= (token.blocks - token.window_blocks) * kRows) return lookup;
    if (!call.selected) {
      lookup.entry = i;
    } else if (i < static_cast<int>(call.chosen)) {
      lookup.entry = __ldg(call.selected + t * call.chosen + i);
    }
    return lookup;
  }
  __device__ __forceinline__ void look_up(const AttendCall& call, const Token& token, Lookup& lookup) const {
    if (static_cast<uint32_t>(lookup.entry) >= static_cast<uint32_t>(token.visible)) return;
    // By the inverse, one too little at most: a division takes as long as the load that follows.
    const uint32_t entry = static_cast<uint32_t>(lookup.entry), per_block = static_cast<uint32_t>(call.per_block);
    uint32_t column = __umulhi(entry, inverse);
    if (entry - column * per_block >= per_block) ++column;
    lookup.entry = static_cast<int32_t>(entry - column * per_block);
    if (column < static_cast<uint32_t>(call.columns))
      lookup.place = __ldg(call.table + token.slot * call.columns + column);
  }
  // Null: not visible.
  __device__ __forceinline__ const uint8_t* finish(const AttendCall& call, const Token& token, const Lookup& lookup,
                                                   int n) const {
    const int row = row_of(n);
    if (row >= token.window_blocks * kRows) {
      if (static_cast<uint32_t>(lookup.place) >= static_cast<uint32_t>(call.num_blocks)) return nullptr;
      const uint32_t at = static_cast<uint32_t>(lookup.place) * static_cast<uint32_t>(call.per_block) + lookup.entry;
      return pool + static_cast<uint64_t>(at) * size;
    }
    const int64_t back = call.window - 1 - row, position = token.position - back;
    if (back < 0 || position < 0) return nullptr;
    if (position < token.first_fresh) {
      const uint32_t at = modulo(static_cast<uint32_t>(position), static_cast<uint32_t>(call.ring_rows));
      return part_at(call.ring, token.slot * call.ring_rows + at, part);
    }
    const int32_t index = token.fresh_rows[position - token.first_fresh];
    return index < 0 || index >= call.tokens ? nullptr : part_at(call.fresh, index, part);
  }

  // The rows of a half block, to `place`. What is not visible is filled with zeros: its probability is 0, and
  // 0 times what lies there must be 0.
  template <bool kGroups>
  __device__ __forceinline__ void fetch(SharedMemory<kGroups>& shared, int place, const uint8_t* from,
                                        const AttendCall& call) const {
    const int first = place * kHalf + kOwn * warp;
    const uint32_t to = ptx::shared_address(shared.rows + first * kPitch);
    const uint32_t seen = __ballot_sync(0xFFFFFFFFu, from != nullptr);
    // To copy nothing from, any address does.
    const uint64_t own = reinterpret_cast<uint64_t>(from ? from : call.ring.nope);
    constexpr int kPieces = kNope / 16;  // a row's codes in 16 bytes; with them come four pieces of its RoPE half
    const bool codes = lane < kPieces;
    const int source = codes ? 0 : kOwn, piece = 16 * (codes ? lane : lane - kPieces);
#pragma unroll
    for (int row = 0; row < kOwn; ++row) {
      const uint64_t at = __shfl_sync(0xFFFFFFFFu, own, source + row);
      ptx::copy_16(to + row * kPitch + 16 * lane, at + piece, seen & (1 << row));
    }
    const int row = lane / 4, rest = 64 + 16 * (lane % 4);  // the other four pieces, of all rows
    const uint64_t at = __shfl_sync(0xFFFFFFFFu, own, kOwn + row);
    ptx::copy_16(to + row * kPitch + kNope + rest, at + rest, seen & (1 << row));
    if (lane / kOwn == 2) {
      shared.visible[first + lane % kOwn] = from != nullptr;
      ptx::copy_small<kGroups ? 8 : 4>(ptx::shared_address(&shared.scale[first + lane % kOwn]), own, from != nullptr);
    }
    const uint32_t full = ptx::shared_address(&shared.full[place]);
    ptx::barrier_arrive_after_copies(full);
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(full);
  }
};

// The largest of a row's scales and, relative to it, that of every 64 values.
__device__ __forceinline__ void unpack_scales(SharedMemory<true>& shared, int row) {
  const float largest = dsv4::unpack_scales<kChunks>(
      shared.scale[row], [&](int i, uint16_t factor) { shared.groups.factor[i][row] = factor; });
  shared.groups.largest[row] = shared.visible[row] ? largest : 0.0f;
}

// What a row's codes are multiplied by, after unpack_scales where there are several scales.
template <bool kGroups>
__device__ __forceinline__ float scale_of(const SharedMemory<kGroups>& shared, int row) {
  if constexpr (kGroups) {
    return shared.groups.largest[row];
  } else {
    return shared.scale[row];
  }
}

// Reduces 16 values over the eight lanes that have the same `quarter`: lane g of them ends with values 2 g and 2 g + 1,
// in x[0] and x[1]. (A template, as the compiler leaves a loop over halves rolled and x in local memory.)
template <int kHalf = 8, typename Combine>
__device__ __forceinline__ void reduce_spread(float (&x)[16], int lane, Combine combine) {
  const bool upper = lane & (2 * kHalf);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float other = __shfl_xor_sync(0xFFFFFFFFu, upper ? x[i] : x[i + kHalf], 2 * kHalf);
    x[i] = combine(upper ? x[i + kHalf] : x[i], other);
  }
  if constexpr (kHalf > 2) reduce_spread<kHalf / 2>(x, lane, combine);
}

// What sums relative to `top` are multiplied by; 0 for a head that saw nothing, whose sums are 0.
__device__ __forceinline__ float inverse_of(float top, float total, float sink) {
  const float reference = top == -INFINITY ? 0.0f : top;
  return total == 0.0f ? 0.0f : 1.0f / (total + ptx::exp2_fast(sink * kLog2e - reference));
}

// The first warpgroup: scores and softmax. The products of a block are under way while the softmax of the one before it
// is taken; with r / s as their first sum, one multiplication by s makes scores of them.
template <bool kGroups>
__device__ __forceinline__ void score_rows(const AttendCall& call, SharedMemory<kGroups>& shared, int blocks,
                                           int first_head) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  // This thread's rows are `low` of its half block and eight below.
  const int low = 16 * (warp & 1) + turned(g);
  // Where the row lies that this thread names of the matrices that the warp stores, rows low and high in turn: its
  // place among the rows of the second product's fragments.
  const int x = turned(lane % 8), stored = 16 * warp + 2 * (x & 3) + (x >> 2) + (lane & 8);
  const float factor = call.scale * kLog2e;
  const bool two_parts = call.is_float || call.cos;  // queries that are not bfloat16 from the start

  float total[16] = {};   // of this thread's rows
  float top = -INFINITY;  // reference of head threadIdx.x
  bool settled = false;   // every head has a reference
  float products[32];     // of the block to come, then of the next
#pragma unroll
  for (int j = 0; j < 32; ++j) products[j] = 0.0f;
  bool sees_low = false, sees_high = false;
  float scale_low = 0.0f, scale_high = 0.0f;
  Place<kGroups> place(warp / 2);

  for (int i = -1; i < blocks; ++i) {
    const bool next = i + 1 < blocks;
    // Scores of block i, relative to the reference: this thread has heads 8 j + 2 quarter and the next, in rows low,
    // high.
    float scores[32];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 reference = *reinterpret_cast<const float2*>(&shared.reference[8 * j + 2 * quarter]);
      scores[4 * j] = fmaf(factor * scale_low, products[4 * j], -reference.x);
      scores[4 * j + 1] = fmaf(factor * scale_low, products[4 * j + 1], -reference.y);
      scores[4 * j + 2] = fmaf(factor * scale_high, products[4 * j + 2], -reference.x);
      scores[4 * j + 3] = fmaf(factor * scale_high, products[4 * j + 3], -reference.y);
    }
    if (!__all_sync(0xFFFFFFFFu, sees_low && sees_high)) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (!sees_low) scores[4 * j] = scores[4 * j + 1] = -INFINITY;
        if (!sees_high) scores[4 * j + 2] = scores[4 * j + 3] = -INFINITY;
      }
    }

    // Products of block i + 1 (after the last, of whatever is there). RoPE halves first.
    if (next) ptx::barrier_wait(ptx::shared_address(&shared.full[place.index]), place.round & 1);
    const int row = place.index * kHalf + low;
    const uint8_t* rows = shared.rows + row * kPitch;
    {
      uint32_t a[4][4];
      const uint8_t* from = rows + kNope + 32 * quarter;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 l = *reinterpret_cast<const uint4*>(from + 16 * half);
        const uint4 h = *reinterpret_cast<const uint4*>(from + 8 * kPitch + 16 * half);
        a[2 * half][0] = l.x, a[2 * half][1] = h.x, a[2 * half][2] = l.y, a[2 * half][3] = h.y;
        a[2 * half + 1][0] = l.z, a[2 * half + 1][1] = h.z, a[2 * half + 1][2] = l.w, a[2 * half + 1][3] = h.w;
      }
      const uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[7]));
      ptx::products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::product_bf16<0>(products, a[step], b + 2 * step, step > 0);
      if (two_parts) {
#pragma unroll
        for (int step = 0; step < 4; ++step)
          ptx::product_bf16<0>(products, a[step], b + (kHeads * 128 >> 4) + 2 * step);
      }
      ptx::products_commit();
    }

    // Most blocks raise no head's reference.
    const int buffer = i & 1;
    const float log_low = ptx::log2_fast(fmaxf(scale_low, 1e-30f)),
                log_high = ptx::log2_fast(fmaxf(scale_high, 1e-30f));
    bool above = !settled;
    {
      float most_low = scores[0], most_high = scores[2];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        most_low = fmaxf(most_low, fmaxf(scores[4 * j], scores[4 * j + 1]));
        most_high = fmaxf(most_high, fmaxf(scores[4 * j + 2], scores[4 * j + 3]));
      }
      above |= fmaxf(most_low + log_low, most_high + log_high) > kRescaleAbove;
    }
    if (i >= 0) above = ptx::any_of_threads(1, kWarpgroup, above);
    if (above && i >= 0) {
      float most[16];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        most[2 * j] = fmaxf(scores[4 * j] + log_low, scores[4 * j + 2] + log_high);
        most[2 * j + 1] = fmaxf(scores[4 * j + 1] + log_low, scores[4 * j + 3] + log_high);
      }
      reduce_spread(most, lane, [](float a, float b) { return fmaxf(a, b); });
      *reinterpret_cast<float2*>(&shared.partial[warp][8 * g + 2 * quarter]) = make_float2(most[0], most[1]);
      ptx::sync_threads(1, kWarpgroup);
      if (threadIdx.x < kHeads) {  // a head each
        const int head = threadIdx.x;
        const float before = top == -INFINITY ? 0.0f : top;
        const float seen = before + fmaxf(fmaxf(shared.partial[0][head], shared.partial[1][head]),
                                          fmaxf(shared.partial[2][head], shared.partial[3][head]));
        const bool raise = seen > top + kRescaleAbove || (top == -INFINITY && seen > -INFINITY);
        shared.alpha[buffer][head] = raise ? ptx::exp2_fast(top - seen) : 1.0f;
        if (raise) top = seen;
        const float after = top == -INFINITY ? 0.0f : top;
        shared.reference[head] = after, shared.shift[head] = before - after;
        const bool rescale = __any_sync(0xFFFFFFFFu, raise) && i > 0, all = __all_sync(0xFFFFFFFFu, top > -INFINITY);
        if (lane == 0) shared.rescale[buffer][warp] = rescale, shared.settled[warp] = all;
      }
      ptx::sync_threads(1, kWarpgroup);
      settled = shared.settled[0] & shared.settled[1];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 shift = *reinterpret_cast<const float2*>(&shared.shift[8 * j + 2 * quarter]);
        scores[4 * j] += shift.x, scores[4 * j + 1] += shift.y, scores[4 * j + 2] += shift.x,
            scores[4 * j + 3] += shift.y;
      }
      if (shared.rescale[buffer][0] | shared.rescale[buffer][1]) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[buffer][8 * j + 2 * quarter]);
          total[2 * j] *= alpha.x, total[2 * j + 1] *= alpha.y;
        }
      }
    } else if (threadIdx.x < 2) {
      shared.rescale[buffer][threadIdx.x] = 0;
    }

    if constexpr (kGroups) {
      if (lane < 16) unpack_scales(shared, place.index * kHalf + 16 * (warp & 1) + lane);
      __syncwarp();
    }
    const bool next_low = next && shared.visible[row], next_high = next && shared.visible[row + 8];
    float next_scale_low = scale_of<kGroups>(shared, row), next_scale_high = scale_of<kGroups>(shared, row + 8);
    // A scale of 0 belongs to codes of 0. NaN stays.
    if (next_scale_low < 1e-30f) next_scale_low = 1e-30f;
    if (next_scale_high < 1e-30f) next_scale_high = 1e-30f;
    const float inverse_low = __fdividef(1.0f, next_scale_low), inverse_high = __fdividef(1.0f, next_scale_high);
    uint32_t a[2][4][4];
    const uint8_t* codes = rows + 16 * quarter;
    uint4 l = *reinterpret_cast<const uint4*>(codes), h = *reinterpret_cast<const uint4*>(codes + 8 * kPitch);
    ptx::products_wait<0>();
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      products[4 * j] *= inverse_low, products[4 * j + 1] *= inverse_low;
      products[4 * j + 2] *= inverse_high, products[4 * j + 3] *= inverse_high;
    }
    uint32_t scaled[4][4], plain[4][4];  // of sixteen heads, rows low and high: eight heads, and the next eight
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      uint32_t (&now)[4][4] = a[chunk & 1];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t wl = word_of(l, step), wh = word_of(h, step);
        ptx::halves_of_e4m3(wl, &now[step][0], &now[step][2]);
        ptx::halves_of_e4m3(wh, &now[step][1], &now[step][3]);
      }
      if constexpr (kGroups) {
        const uint32_t fl = shared.groups.factor[chunk][row] * 0x10001u,
                       fh = shared.groups.factor[chunk][row + 8] * 0x10001u;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          now[step][0] = ptx::multiply_halves(now[step][0], fl), now[step][2] = ptx::multiply_halves(now[step][2], fl);
          now[step][1] = ptx::multiply_halves(now[step][1], fh), now[step][3] = ptx::multiply_halves(now[step][3], fh);
        }
      }
      if (chunk + 1 < kChunks) {  // they come while the products run
        l = *reinterpret_cast<const uint4*>(codes + 64 * (chunk + 1));
        h = *reinterpret_cast<const uint4*>(codes + 8 * kPitch + 64 * (chunk + 1));
      }
      const uint64_t b = ptx::tile_descriptor(ptx::shared_address(shared.q[chunk]));
      ptx::products_fence();
#pragma unroll
      for (int step = 0; step < 4; ++step) ptx::product_f16<0>(products, now[step], b + 2 * step);
      ptx::products_commit();
      if (chunk < 4) {  // sixteen heads of the softmax meanwhile
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 2 * chunk + half;
          float pl[2], ph[2];
#pragma unroll
          for (int k = 0; k < 2; ++k) {
            pl[k] = ptx::exp2_fast(scores[4 * j + k]), ph[k] = ptx::exp2_fast(scores[4 * j + 2 + k]);
            total[2 * j + k] += pl[k] + ph[k];
          }
          plain[chunk][2 * half] = ptx::bfloat_pair(pl[0], pl[1]),
                           plain[chunk][2 * half + 1] = ptx::bfloat_pair(ph[0], ph[1]);
          scaled[chunk][2 * half] = ptx::half_pair(pl[0] * scale_low, pl[1] * scale_low);
          scaled[chunk][2 * half + 1] = ptx::half_pair(ph[0] * scale_high, ph[1] * scale_high);
        }
      }
      if (chunk == 4 && i >= 0) {
        if (i >= 1) ptx::barrier_wait(ptx::shared_address(&shared.p_empty), (i - 1) & 1);
        const uint32_t p = ptx::shared_address(shared.p), p_rope = ptx::shared_address(shared.p_rope);
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          const uint32_t at = swizzled(stored, 2 * pair + (lane >> 4));
          ptx::store_matrices(p_rope + at, plain[pair]);
          ptx::store_matrices(p + at, scaled[pair]);
        }
        ptx::fence_shared_proxy();
        ptx::barrier_arrive(ptx::shared_address(&shared.p_full));
      }
      ptx::products_wait<1>();
    }
    ptx::products_wait<0>();
    sees_low = next_low, sees_high = next_high;
    scale_low = next_scale_low, scale_high = next_scale_high;
    place.advance(2);
  }

  reduce_spread(total, lane, [](float a, float b) { return a + b; });
  ptx::sync_threads(1, kWarpgroup);  // the maxima were read
  *reinterpret_cast<float2*>(&shared.partial[warp][8 * g + 2 * quarter]) = make_float2(total[0], total[1]);
  ptx::sync_threads(1, kWarpgroup);
  if (threadIdx.x < kHeads) {
    const int head = threadIdx.x;
    shared.top[head] = top;
    const float sum =
        (shared.partial[0][head] + shared.partial[1][head]) + (shared.partial[2][head] + shared.partial[3][head]);
    shared.total[head] = sum;
    if (gridDim.x == 1 && first_head + head < call.heads) {
      shared.inverse[head] = inverse_of(top, sum, __ldg(call.sink + first_head + head));
    }
  }
}

// Two rows' codes of four values -> halves (row a, row b) of each value.
__device__ __forceinline__ void pair_rows(uint32_t a, uint32_t b, uint32_t (&out)[4]) {
  ptx::halves_of_e4m3(__byte_perm(a, b, 0x5140), &out[0], &out[1]);
  ptx::halves_of_e4m3(__byte_perm(a, b, 0x7362), &out[2], &out[3]);
}

// The first of the two values that a thread has of a tile of 64: warpgroup 0 has values 0 to 255; warpgroup 1 256 to
// 447 in tiles 0 to 2, and in tile 3 the RoPE half.
template <int kPart>
__device__ __forceinline__ int first_value(int tile, int warp, int g) {
  if (kPart == 0 || tile < 2) return 256 * kPart + 128 * (tile / 2) + 32 * warp + 4 * g + 2 * (tile % 2);
  return (tile == 2 ? 384 : kNope) + 16 * warp + 2 * g;
}

// The codes that a thread has of a sixteen-row step and two tiles: of four rows, four values or two.
template <int kPart>
__device__ __forceinline__ void load_codes(uint32_t (&words)[4], const uint8_t* rows, int tiles, int warp, int g) {
  const uint8_t* from = rows + first_value<kPart>(2 * tiles, warp, g);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (kPart == 0 || tiles == 0) {
      words[r] = *reinterpret_cast<const uint32_t*>(from + 4 * r * kPitch);
    } else {
      words[r] = *reinterpret_cast<const uint16_t*>(from + 4 * r * kPitch);
    }
  }
}

// The second and third: out += values by probabilities.
template <bool kGroups, int kPart>
__device__ __forceinline__ void add_values(SharedMemory<kGroups>& shared, int blocks, float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
#pragma unroll
    for (int i = 0; i < 32; ++i) out[tile][i] = 0.0f;
  }
  Place<kGroups> place(0);
  for (int i = 0; i < blocks; ++i) {
    ptx::barrier_wait(ptx::shared_address(&shared.p_full), i & 1);
    if (shared.rescale[i & 1][0] | shared.rescale[i & 1][1]) {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 alpha = *reinterpret_cast<const float2*>(&shared.alpha[i & 1][8 * j + 2 * quarter]);
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) {
          out[tile][4 * j] *= alpha.x, out[tile][4 * j + 1] *= alpha.y;
          out[tile][4 * j + 2] *= alpha.x, out[tile][4 * j + 3] *= alpha.y;
        }
      }
    }
    uint64_t p = ptx::tile_descriptor(ptx::shared_address(shared.p));
    uint64_t p_rope = ptx::tile_descriptor(ptx::shared_address(shared.p_rope));
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      // The half's rows came before the scores that p_full tells of; this makes what copies wrote visible here.
      ptx::barrier_wait(ptx::shared_address(&shared.full[place.index]), place.round & 1);
      int row = place.index * kHalf + quarter;
      const uint8_t* rows = shared.rows + row * kPitch;
      // In four parts, of 16 rows and two tiles each. What a part loads comes while the products of the one before it
      // run; converting that early too would take more registers than there are.
      uint32_t words[4];  // of the part's four rows
      load_codes<kPart>(words, rows, 0, warp, g);
#pragma unroll 1
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int tiles = 0; tiles < 2; ++tiles) {
          uint32_t factors[2];  // of both pairs of rows
          if constexpr (kGroups) {
            const uint16_t* factor = &shared.groups.factor[first_value<kPart>(2 * tiles, warp, 0) / 64][row];
            factors[0] = factor[0] | static_cast<uint32_t>(factor[4]) << 16;
            factors[1] = factor[8] | static_cast<uint32_t>(factor[12]) << 16;
          }
          // a[tile][0]: value 0, rows 0 and 1; [1]: value 1; [2]: value 0, rows 2 and 3; [3]: value 1.
          uint32_t a[2][4];
          if (kPart == 0 || tiles == 0) {
            uint32_t low[4], high[4];
            pair_rows(words[0], words[1], low);
            pair_rows(words[2], words[3], high);
            if constexpr (kGroups) {
#pragma unroll
              for (int v = 0; v < 4; ++v) {
                low[v] = ptx::multiply_halves(low[v], factors[0]);
                high[v] = ptx::multiply_halves(high[v], factors[1]);
              }
            }
#pragma unroll
            for (int tile = 0; tile < 2; ++tile) {
              a[tile][0] = low[2 * tile], a[tile][1] = low[2 * tile + 1];
              a[tile][2] = high[2 * tile], a[tile][3] = high[2 * tile + 1];
            }
          } else {
            ptx::halves_of_e4m3(__byte_perm(words[0], words[1], 0x5140), &a[0][0], &a[0][1]);
            ptx::halves_of_e4m3(__byte_perm(words[2], words[3], 0x5140), &a[0][2], &a[0][3]);
            if constexpr (kGroups) {
#pragma unroll
              for (int v = 0; v < 4; ++v) a[0][v] = ptx::multiply_halves(a[0][v], factors[v / 2]);
            }
            uint32_t r[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
              r[n] = *reinterpret_cast<const uint32_t*>(rows + 4 * n * kPitch + kNope + 32 * warp + 4 * g);
            }
            a[1][0] = __byte_perm(r[0], r[1], 0x5410), a[1][1] = __byte_perm(r[0], r[1], 0x7632);
            a[1][2] = __byte_perm(r[2], r[3], 0x5410), a[1][3] = __byte_perm(r[2], r[3], 0x7632);
          }
          ptx::products_fence();
          ptx::product_f16<1>(out[2 * tiles], a[0], p);
          if (kPart == 1 && tiles == 1) {
            ptx::product_bf16<1>(out[3], a[1], p_rope);
          } else {
            ptx::product_f16<1>(out[2 * tiles + 1], a[1], p);
          }
          ptx::products_commit();
          if (tiles == 0) {
            load_codes<kPart>(words, rows, 1, warp, g);
          } else if (step == 0) {
            load_codes<kPart>(words, rows + 16 * kPitch, 0, warp, g);
          }
          ptx::products_wait<0>();
        }
        p += 128, p_rope += 128, row += 16, rows += 16 * kPitch;
      }
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(ptx::shared_address(&shared.empty[place.index]));
      if (half && lane == 0) ptx::barrier_arrive(ptx::shared_address(&shared.p_empty));
      place.advance(1);
    }
  }
}

// The last: all half blocks from the first-th on, each as soon as its place is free.
template <bool kGroups>
__device__ __forceinline__ void fetch_rows(const AttendCall& call, SharedMemory<kGroups>& shared, const Token& token,
                                           int64_t t, int first, int halves, int n, Fetcher::Lookup looked,
                                           Fetcher::Lookup next) {
  const Fetcher fetcher(call);
  Place<kGroups> place(n);
  for (; n < halves; ++n) {
    const uint8_t* rows = fetcher.finish(call, token, looked, first + n);
    fetcher.look_up(call, token, next);
    looked = next;
    next = fetcher.look(call, token, t, first + n + 2);
    if (place.round) ptx::barrier_wait(ptx::shared_address(&shared.empty[place.index]), (place.round - 1) & 1);
    fetcher.fetch(shared, place.index, rows, call);
    place.advance(1);
  }
}

// Two values of a head, the first at an even place: rotated back where queries came raw, and stored.
__device__ __forceinline__ void store_pair(const AttendCall& call, int64_t t, int64_t head, int value, float a,
                                           float b) {
  if (call.cos && value >= kNope) {
    const int64_t pair = t * (kRope / 2) + (value - kNope) / 2;
    const float c = __ldg(call.cos + pair), s = __ldg(call.sin + pair), x = a;
    a = x * c + b * s, b = b * c - x * s;
  }
  const int64_t at = (t * call.heads + head) * kWidth + value;
  if (call.is_float) {
    *reinterpret_cast<float2*>(static_cast<float*>(call.out) + at) = make_float2(a, b);
  } else {
    *reinterpret_cast<uint32_t*>(static_cast<BFloat16*>(call.out) + at) = ptx::bfloat_pair(a, b);
  }
}

// The output of a warpgroup of a thread block alone, from its registers.
template <bool kGroups, int kPart>
__device__ __forceinline__ void store_values(const AttendCall& call, const SharedMemory<kGroups>& shared, int64_t t,
                                             int first_head, int heads, const float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
  constexpr int kRopeTile = 3;  // of the second part
  float c = 1.0f, s = 0.0f;
  if (kPart == 1 && call.cos) {
    const int64_t pair = t * (kRope / 2) + (first_value<kPart>(kRopeTile, warp, g) - kNope) / 2;
    c = __ldg(call.cos + pair), s = __ldg(call.sin + pair);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const int head = 8 * j + 2 * quarter + k;
      if (head >= heads) continue;
      const float inverse = shared.inverse[head];
      const int64_t at = (t * call.heads + first_head + head) * kWidth;
      float a[4], b[4];
#pragma unroll
      for (int tile = 0; tile < 4; ++tile)
        a[tile] = out[tile][4 * j + k] * inverse, b[tile] = out[tile][4 * j + 2 + k] * inverse;
      if (kPart == 1 && call.cos) {
        const float x = a[kRopeTile], y = b[kRopeTile];
        a[kRopeTile] = x * c + y * s, b[kRopeTile] = y * c - x * s;
      }
#pragma unroll
      for (int tile = 0; tile < 4; tile += 2) {
        const int64_t first = at + first_value<kPart>(tile, warp, g),
                      second = at + first_value<kPart>(tile + 1, warp, g);
        const bool together = kPart == 0 || tile == 0;  // four values in a row
        if (call.is_float) {
          float* to = static_cast<float*>(call.out);
          *reinterpret_cast<float2*>(to + first) = make_float2(a[tile], b[tile]);
          *reinterpret_cast<float2*>(to + second) = make_float2(a[tile + 1], b[tile + 1]);
        } else {
          BFloat16* to = static_cast<BFloat16*>(call.out);
          const uint32_t low = ptx::bfloat_pair(a[tile], b[tile]), high = ptx::bfloat_pair(a[tile + 1], b[tile + 1]);
          if (together) {
            *reinterpret_cast<uint2*>(to + first) = make_uint2(low, high);
          } else {
            *reinterpret_cast<uint32_t*>(to + first) = low, *reinterpret_cast<uint32_t*>(to + second) = high;
          }
        }
      }
    }
  }
}

// The sums of a warpgroup, heads `pitch` apart.
template <int kPart>
__device__ __forceinline__ void put_values(float* sums, int pitch, const float (&out)[4][32]) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32, g = lane / 4, quarter = lane % 4;
#pragma unroll
  for (int tile = 0; tile < 4; ++tile) {
    float* to = sums + 2 * quarter * pitch + first_value<kPart>(tile, warp, g);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float2 pair = make_float2(out[tile][4 * j + k], out[tile][4 * j + 2 + k]);
        *reinterpret_cast<float2*>(to + (8 * j + k) * pitch) = pair;
      }
    }
  }
}

template <bool kGroups>
__global__ void __launch_bounds__(kThreads, 1) attend_kernel(const __grid_constant__ AttendCall call, float* partials) {
  extern __shared__ uint8_t raw[];
  using Shared = SharedMemory<kGroups>;
  Shared& shared =
      *reinterpret_cast<Shared*>((reinterpret_cast<uintptr_t>(raw) + 1023) & ~static_cast<uintptr_t>(1023));
  const int64_t t = blockIdx.z;
  const int first_head = blockIdx.y * kHeads;
  const int splits = static_cast<int>(gridDim.x), rank = static_cast<int>(blockIdx.x);
  if (partials) ptx::grid_launch_dependents();  // who adds up waits for this kernel's end
  const Token token = token_of(call, t);
  if (!token.blocks) {  // padding, the same in the whole cluster
    if (partials) return;
    const int heads = min(kHeads, static_cast<int>(call.heads) - first_head);
    for (int i = threadIdx.x + rank * kThreads; i < heads * kWidth / 2; i += kThreads * splits) {
      const int64_t at = (t * call.heads + first_head) * kWidth + 2 * i;
      if (call.is_float) {
        *reinterpret_cast<float2*>(static_cast<float*>(call.out) + at) = make_float2(0.0f, 0.0f);
      } else {
        *reinterpret_cast<uint32_t*>(static_cast<BFloat16*>(call.out) + at) = 0;
      }
    }
    return;
  }
  const int first = static_cast<int>(static_cast<int64_t>(token.blocks) * rank / splits);
  const int end = static_cast<int>(static_cast<int64_t>(token.blocks) * (rank + 1) / splits);

  if (threadIdx.x == 0) {
    ptx::barrier_init(ptx::shared_address(&shared.queries), 1);
    for (int i = 0; i < kHalves<kGroups>; ++i) {
      ptx::barrier_init(ptx::shared_address(&shared.full[i]), kWarpgroup + 4);
      ptx::barrier_init(ptx::shared_address(&shared.empty[i]), 8);
    }
    ptx::barrier_init(ptx::shared_address(&shared.p_full), kWarpgroup);
    ptx::barrier_init(ptx::shared_address(&shared.p_empty), 8);
  }
  if (threadIdx.x < kHeads) shared.reference[threadIdx.x] = 0.0f;
  __syncthreads();
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpgroup, 0);
  const int heads = min(kHeads, static_cast<int>(call.heads) - first_head);
  const int64_t query = (t * call.heads + first_head) * kWidth;
  // Queries in bfloat16 pass through the places of rows after the first block.
  const uint32_t arrived = ptx::shared_address(&shared.queries);
  if (!call.is_float && threadIdx.x == 0) {
    const uint32_t bytes = heads * kWidth * 2;
    ptx::barrier_arrive_expect(arrived, bytes);
    ptx::copy_bulk(ptx::shared_address(shared.rows + kRows * kPitch), static_cast<const BFloat16*>(call.q) + query,
                   bytes, arrived);
  }
  const int halves = 2 * (end - first);
  Fetcher::Lookup lookups[4];  // of the last warpgroup
  if (group == 3) {
    const Fetcher fetcher(call);
#pragma unroll
    for (int i = 0; i < 4; ++i) lookups[i] = fetcher.look(call, token, t, 2 * first + i);
#pragma unroll
    for (int i = 0; i < 3; ++i) fetcher.look_up(call, token, lookups[i]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i < halves) fetcher.fetch(shared, i, fetcher.finish(call, token, lookups[i], 2 * first + i), call);
    }
  }
  if (call.is_float) {
    take_queries(call, shared, static_cast<const float*>(call.q) + query, t, heads);
  } else {
    ptx::barrier_wait(arrived, 0);
    take_queries(call, shared, reinterpret_cast<const BFloat16*>(shared.rows + kRows * kPitch), t, heads);
  }
  ptx::fence_shared_proxy();
  __syncthreads();
  if (group == 3) {
    ptx::fewer_registers<kFetchRegisters>();
    fetch_rows<kGroups>(call, shared, token, t, 2 * first, halves, 2, lookups[2], lookups[3]);
    return;
  }
  const bool alone = splits == 1 && !partials;
  float* const partial = partials ? partials + ((t * gridDim.y + blockIdx.y) * splits + rank) * kPartial : nullptr;
  float* const sums = partials ? partial : shared.part;
  const int pitch = partials ? kWidth : kPartPitch;
  if (group == 0) {
    ptx::more_registers<kScoreRegisters>();
    score_rows<kGroups>(call, shared, end - first, first_head);
    ptx::sync_threads(2, kConsumers);
    if (partials && threadIdx.x < kHeads) {
      const float2 softmax = make_float2(shared.top[threadIdx.x], shared.total[threadIdx.x]);
      reinterpret_cast<float2*>(partial + kHeads * kWidth)[threadIdx.x] = softmax;
    }
  } else if (group == 1) {
    ptx::more_registers<kValueRegisters>();
    float out[4][32];
    add_values<kGroups, 0>(shared, end - first, out);
    ptx::sync_threads(2, kConsumers);  // rows and queries are not needed any more
    alone ? store_values<kGroups, 0>(call, shared, t, first_head, heads, out) : put_values<0>(sums, pitch, out);
  } else {
    ptx::more_registers<kValueRegisters>();
    float out[4][32];
    add_values<kGroups, 1>(shared, end - first, out);
    ptx::sync_threads(2, kConsumers);
    alone ? store_values<kGroups, 1>(call, shared, t, first_head, heads, out) : put_values<1>(sums, pitch, out);
  }
  if (alone || partials) return;
  ptx::cluster_sync();

  // Each block of a cluster adds up some of the heads, in the order of the blocks: a warp a head.
  const int lane = threadIdx.x % 32;
  for (int head = rank + splits * (threadIdx.x / 32); head < heads; head += splits * (kConsumers / 32)) {
    float top_here = -INFINITY, total_here = 0.0f;  // of block `lane`
    if (lane < splits) {
      top_here = ptx::load_remote(ptx::address_in(ptx::shared_address(&shared.top[head]), lane));
      total_here = ptx::load_remote(ptx::address_in(ptx::shared_address(&shared.total[head]), lane));
    }
    float top = top_here;
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    const float reference = top == -INFINITY ? 0.0f : top;
    // A part without a maximum has sums of 0, or of NaN.
    const float weight_here = ptx::exp2_fast((top_here == -INFINITY ? reference : top_here) - reference);
    const uint32_t part = ptx::shared_address(shared.part + head * kPartPitch + 2 * lane);
    float total = 0.0f;
    float2 sums[8] = {};
#pragma unroll 4
    for (int r = 0; r < splits; ++r) {
      const float weight = __shfl_sync(0xFFFFFFFFu, weight_here, r);
      total = fmaf(weight, __shfl_sync(0xFFFFFFFFu, total_here, r), total);
      const uint32_t from = ptx::address_in(part, r);
      float2 pairs[8];
#pragma unroll
      for (int n = 0; n < 8; ++n) pairs[n] = ptx::load_remote_pair(from + 256 * n);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        sums[n].x = fmaf(weight, pairs[n].x, sums[n].x), sums[n].y = fmaf(weight, pairs[n].y, sums[n].y);
      }
    }
    const float inverse = inverse_of(top, total, __ldg(call.sink + first_head + head));
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      store_pair(call, t, first_head + head, 64 * n + 2 * lane, sums[n].x * inverse, sums[n].y * inverse);
    }
  }
  ptx::cluster_sync();  // others may still read here
}

// Adds up what the thread blocks of a token left, in their order: a warp a head and a quarter of its values.
constexpr int kCombineWarps = 8;
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_kernel(const __grid_constant__ AttendCall call, const float* partials, int splits) {
  const int lane = threadIdx.x % 32, unit = blockIdx.x * kCombineWarps + threadIdx.x / 32;
  const int head = unit / 4, value = 128 * (unit % 4) + 4 * lane;
  const int64_t t = blockIdx.y, groups = (call.heads + kHeads - 1) / kHeads;
  if (head >= call.heads) return;
  const float sink = __ldg(call.sink + head);
  const int32_t slot = __ldg(call.slots + t), position = __ldg(call.positions + t);
  float top = -INFINITY, total = 0.0f;
  float4 sums = {};
  ptx::grid_wait();
  if (call.is_slot(slot) && position >= 0) {
    const float* first = partials + (t * groups + head / kHeads) * splits * kPartial;
    const float* softmax = first + kHeads * kWidth + 2 * (head % kHeads);
    for (int r = lane; r < splits; r += 32) top = fmaxf(top, softmax[r * kPartial]);
#pragma unroll
    for (int step = 16; step; step /= 2) top = fmaxf(top, __shfl_xor_sync(0xFFFFFFFFu, top, step));
    const float reference = top == -INFINITY ? 0.0f : top;
    const float* from = first + head % kHeads * kWidth + value;
#pragma unroll 8
    for (int r = 0; r < splits; ++r) {
      const float2 here = *reinterpret_cast<const float2*>(softmax + r * kPartial);
      const float4 x = *reinterpret_cast<const float4*>(from + r * kPartial);
      // A part without a maximum has sums of 0, or of NaN.
      const float weight = ptx::exp2_fast((here.x == -INFINITY ? reference : here.x) - reference);
      total = fmaf(weight, here.y, total);
      sums.x = fmaf(weight, x.x, sums.x), sums.y = fmaf(weight, x.y, sums.y);
      sums.z = fmaf(weight, x.z, sums.z), sums.w = fmaf(weight, x.w, sums.w);
    }
  }
  const float inverse = inverse_of(top, total, sink);
  store_pair(call, t, head, value, sums.x * inverse, sums.y * inverse);
  store_pair(call, t, head, value + 2, sums.z * inverse, sums.w * inverse);
}

}  // namespace dsv4::attend_sm90

#endif  // DSV4_ATTEND_SM90_CUH_
