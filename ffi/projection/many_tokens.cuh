// A product with block-scaled FP8 weights for many tokens: codes go from memory to registers and to the tensor cores as
// they are; activations are sums of two E4M3 values (cuda/split_e4m3.cuh).
//
// 128 tokens are an image in memory, as shared memory takes it. Two thread blocks of a cluster have 128 rows each and
// share it, a block of columns at a time: each asks for half, which both get. Each has two warpgroups of 64 rows, which
// load codes two blocks ahead of those that are multiplied.
#ifndef DSV4_PROJECTION_MANY_TOKENS_CUH_
#define DSV4_PROJECTION_MANY_TOKENS_CUH_

#include "cuda/split_e4m3.cuh"
#include "cuda/wgmma.cuh"
#include "projection/input.cuh"

namespace dsv4::projection {

constexpr int kManyTokens = 128;  // of an image
constexpr int kManyCluster = 2;   // thread blocks that share it
constexpr int kGroupRows = 64, kManyGroups = 2, kManyConsumers = 128 * kManyGroups;
constexpr int kManyThreads = kManyConsumers + 128, kManyRegisters = 232, kCopyingRegisters = 40;
constexpr int kManyRows = kGroupRows * kManyGroups * kManyCluster;
constexpr int kBlockColumns = 128;  // that share a scale
constexpr int kImageStage = kManyTokens * kBlockColumns * 2, kImageStages = 5;
constexpr int kPanel = 8;  // images whose products with the same weights run at about the same time
constexpr int kResultPitch = kGroupRows * 2 + 16;  // bytes of a token's results of a warpgroup
constexpr int kManyShared = kImageStages * (kImageStage + 16) + kManyGroups * kManyTokens * kResultPitch;

// A block prepares eight tokens' rows of a group. Places of tokens beyond the last are zero. `inverse`: what products
// are to be multiplied by. Grid: places of all images / 8, groups.
template <Before kBefore>
__global__ void __launch_bounds__(256) image_kernel(const Call call, uint8_t* images, float* inverse) {
  __shared__ float powers[8], roots[8];
  const int places = gridDim.x * 8, first = blockIdx.x * 8, group = blockIdx.y;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::grid_launch_dependents();
  {
    Magnitude<kBefore> magnitude;
    const int t = first + warp;
    if (t < call.tokens) {
#pragma unroll 4
      for (int i = lane; i < call.columns / 8; i += 32) magnitude.take(call, call.row_of(t, group), i);
    }
    magnitude.reduce_warp();
    const float root = magnitude.root(call);
    const float power = t < call.tokens ? into_e4m3(__uint_as_float(magnitude.bits(root) << 16)) : 0.0f;
    if (lane == 0) {
      powers[warp] = power, roots[warp] = root;
      inverse[static_cast<int64_t>(group) * places + t] = 1.0f / power;
    }
  }
  __syncthreads();
  const int t = lane % 8, token = first + t, place = first % kManyTokens + t;
  const bool is_there = token < call.tokens;
  const float power = powers[t], root = roots[t];
  const int64_t row = call.row_of(token, group), first_place = static_cast<int64_t>(group) * places + first - place + t;
  uint4* image = reinterpret_cast<uint4*>(images + first_place * call.columns * 2) + place;
  // A product of 32 columns: of 64, those that four threads have in one of two pairs of words.
#pragma unroll 2
  for (int product = warp * 4 + lane / 8; product < call.columns / 32; product += 32) {
    uint32_t high[2][4], low[2][4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      uint4 v = make_uint4(0, 0, 0, 0);
      if (is_there) v = prepared<kBefore>(call, row, product / 2 * 8 + c * 2 + product % 2, root);
      const float2 p = floats_of(v.x, __nv_bfloat16()), q = floats_of(v.y, __nv_bfloat16());
      const float2 r = floats_of(v.z, __nv_bfloat16()), s = floats_of(v.w, __nv_bfloat16());
      const uint2 a = split_four(p.x * power, p.y * power, q.x * power, q.y * power);
      const uint2 b = split_four(r.x * power, r.y * power, s.x * power, s.y * power);
      high[0][c] = a.x, low[0][c] = a.y, high[1][c] = b.x, low[1][c] = b.y;
    }
    uint4* to = image + product * 4 * kManyTokens;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      to[h * kManyTokens] = make_uint4(high[h][0], high[h][1], high[h][2], high[h][3]);
      to[(2 + h) * kManyTokens] = make_uint4(low[h][0], low[h][1], low[h][2], low[h][3]);
    }
  }
}

// What a cluster multiplies: some rows with an image. Images of a panel take turns.
struct Item {
  int row, image;
  __device__ __forceinline__ Item(const Call& call, int images, int at) {
    const int row_blocks = call.rows / kManyRows, panel = at / (row_blocks * kPanel);
    const int inside = at % (row_blocks * kPanel), width = min(kPanel, images - panel * kPanel);
    row = inside / width * kManyRows, image = panel * kPanel + inside % width;
  }
};

__global__ void __cluster_dims__(kManyCluster, 1, 1) __launch_bounds__(kManyThreads, 1)
    many_tokens_kernel(const Call call, const uint8_t* images, const float* inverse, const int number) {
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = ptx::shared_address(shared);
  const uint32_t results = base + kImageStages * kImageStage;
  const uint32_t full = results + kManyGroups * kManyTokens * kResultPitch, empty = full + kImageStages * 8;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kImageStages; ++i)
      ptx::barrier_init(full + i * 8, 1), ptx::barrier_init(empty + i * 8, kManyCluster * kManyConsumers / 32);
    ptx::fence_barrier_init();
  }
  ptx::cluster_sync();
  const int rank = blockIdx.x % kManyCluster, cluster = blockIdx.x / kManyCluster, clusters = gridDim.x / kManyCluster;
  const int all = call.rows / kManyRows * number, blocks = call.columns / kBlockColumns;
  const int rows_of_group = call.rows / call.groups;
  int stage = 0;
  uint32_t phase = 0;
  const auto next = [&] {
    if (++stage == kImageStages) stage = 0, phase ^= 1;
  };

  if (threadIdx.x >= kManyConsumers) {
    ptx::fewer_registers<kCopyingRegisters>();
    if (threadIdx.x < kManyConsumers + 32) {
      const int lane = threadIdx.x % 32;
      constexpr int kShare = kImageStage / kManyCluster, kOwnRows = kManyRows / kManyCluster;
      ptx::grid_wait();  // images
      for (int at = cluster; at < all; at += clusters) {
        const Item item(call, number, at);
        const int64_t image = static_cast<int64_t>(item.row / rows_of_group) * number + item.image;
        const uint8_t* from = images + image * kManyTokens * call.columns * 2 + rank * kShare;
        const Weight weight = call.of_row(item.row);
        const uint8_t* codes =
            weight.codes + static_cast<int64_t>(item.row - weight.first + rank * kOwnRows + lane) * call.columns;
        for (int block = 0; block < blocks; ++block, next()) {
          ptx::barrier_wait(empty + stage * 8, phase ^ 1);
          if (lane == 0) {
            ptx::barrier_arrive_expect(full + stage * 8, kImageStage);
            ptx::copy_bulk_to_cluster(base + stage * kImageStage + rank * kShare, from + block * kImageStage, kShare,
                                      full + stage * 8, (1 << kManyCluster) - 1);
          }
          // The codes that meet them, into the L2.
#pragma unroll 1
          for (int r = 0; r < kOwnRows; r += 32)
            ptx::prefetch_l2(codes + static_cast<int64_t>(r) * call.columns + block * kBlockColumns);
        }
      }
    }
    ptx::cluster_sync();  // what the other one sends has come
    return;
  }

  ptx::more_registers<kManyRegisters>();
  const int warpgroup = threadIdx.x / 128, lane = threadIdx.x % 32, c = lane % 4;
  const int first_row = rank * kGroupRows * kManyGroups, own_row = first_row + threadIdx.x / 32 * 16;
  // Of a block of columns a thread has 16 codes of every 64, in rows r and r + 8.
  uint4 codes[2][2][2];  // of two blocks
  const uint8_t* from;
  const auto aim = [&](int at) {
    const int row = Item(call, number, at).row;
    const Weight weight = call.of_row(row);
    from = weight.codes + c * 16 + static_cast<int64_t>(row - weight.first + own_row + lane / 4) * call.columns;
  };
  const auto load = [&](int buffer) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int u = 0; u < 2; ++u) codes[buffer][h][u] = ptx::load_ahead_16(from + h * 8 * call.columns + u * 64);
    }
    from += kBlockColumns;
  };
  // 0, which the compiler does not see: it would put codes into the order of products where they were loaded, and wait.
  const uint32_t none = call.tokens >> 31;
  aim(cluster);
  load(0), load(1);
  ptx::grid_wait();  // what to multiply by
  for (int at = cluster; at < all; at += clusters) {
    const Item item(call, number, at);
    const Weight weight = call.of_row(item.row);
    const int row = item.row - weight.first;
    const uint8_t* scales = weight.scale + static_cast<int64_t>((row + own_row) / 128) * blocks;
    float sum[kManyTokens / 2] = {}, d[kManyTokens / 2];
    const auto multiply = [&](int buffer, int block) {
      const float scale = __uint_as_float(static_cast<uint32_t>(__ldg(scales + block)) << 23);
      uint32_t a[4][4];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const uint4 x = codes[buffer][0][u], y = codes[buffer][1][u];
        a[2 * u][0] = x.x ^ none, a[2 * u][1] = y.x ^ none, a[2 * u][2] = x.y ^ none, a[2 * u][3] = y.y ^ none;
        a[2 * u + 1][0] = x.z ^ none, a[2 * u + 1][1] = y.z ^ none, a[2 * u + 1][2] = x.w ^ none,
                  a[2 * u + 1][3] = y.w ^ none;
      }
      // Behind the last item its first codes again.
      if (buffer == 0 && block + 2 == blocks) aim(at + clusters < all ? at + clusters : at);
      load(buffer);
      ptx::barrier_wait(full + stage * 8, phase);
      const ptx::PieceDescriptors<kManyTokens * 16> descriptors(base + stage * kImageStage);
      ptx::products_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma_e4m3<kManyTokens>(d, a[k], descriptors.at(k * 4 * kManyTokens * 16), k > 0);
        wgmma_e4m3<kManyTokens>(d, a[k], descriptors.at((k * 4 + 2) * kManyTokens * 16), 1);
      }
      ptx::products_commit();
      ptx::products_wait<0>();
      if (lane < kManyCluster) ptx::barrier_arrive_remote(ptx::address_in(empty + stage * 8, lane));
#pragma unroll
      for (int i = 0; i < kManyTokens / 2; ++i) sum[i] = fmaf(d[i], scale, sum[i]);
      next();
    };
#pragma unroll 1
    for (int block = 0; block < blocks; block += 2) multiply(0, block), multiply(1, block + 1);

    // Results go out through shared memory, where the rows of a token lie side by side.
    ptx::stores_wait_read();
    ptx::sync_threads(1 + warpgroup, 128);
    const int64_t image = static_cast<int64_t>(item.row / rows_of_group) * number + item.image;
    const float* factors = inverse + image * kManyTokens + c * 2;
    const uint32_t own = results + warpgroup * kManyTokens * kResultPitch;
    const uint32_t to = own + (lane / 16 * 8 + lane % 8) * kResultPitch + (own_row % kGroupRows + lane / 8 % 2 * 8) * 2;
#pragma unroll
    for (int j = 0; j < kManyTokens / 8; j += 2) {
      const float2 f = *reinterpret_cast<const float2*>(factors + j * 8);
      const float2 g = *reinterpret_cast<const float2*>(factors + j * 8 + 8);
      const float *u = sum + 4 * j, *v = u + 4;
      const uint32_t pairs[4] = {ptx::bfloat_pair(u[0] * f.x, u[1] * f.y), ptx::bfloat_pair(u[2] * f.x, u[3] * f.y),
                                 ptx::bfloat_pair(v[0] * g.x, v[1] * g.y), ptx::bfloat_pair(v[2] * g.x, v[3] * g.y)};
      ptx::store_matrices_transposed(to + j * 8 * kResultPitch, pairs);
    }
    ptx::fence_shared_proxy();
    ptx::sync_threads(1 + warpgroup, 128);
    const int place = threadIdx.x % 128, token = item.image * kManyTokens + place;
    if (token < call.tokens) {
      ptx::store_bulk(weight.y + static_cast<int64_t>(token) * weight.rows + row + first_row + warpgroup * kGroupRows,
                      own + place * kResultPitch, kGroupRows * 2);
    }
  }
  ptx::stores_wait_read();
  ptx::cluster_sync();
}

}  // namespace dsv4::projection

#endif  // DSV4_PROJECTION_MANY_TOKENS_CUH_
