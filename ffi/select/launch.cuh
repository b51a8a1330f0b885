// The launches of select on Hopper.
#ifndef DSV4_SELECT_LAUNCH_CUH_
#define DSV4_SELECT_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <string>

#include "select/scores.cuh"
#include "select/top_k.cuh"

namespace dsv4::select_sm90 {

constexpr int64_t kBlocks = 264;       // of kThreads threads, that fill the chip
constexpr int64_t kShareTokens = 132;  // from so many tokens of a piece on, thread blocks take several

// What keeps a call from being served: got ...; expected ...; empty if nothing does.
inline std::string limit_of(const SelectCall& call) {
  if (call.width != kWidth) return "keys of " + std::to_string(call.width) + " values; expected 128";
  if (call.heads < 1 || call.heads > kHeads) return std::to_string(call.heads) + " heads; expected 1 to 64";
  if (call.k > kMostK) return "k " + std::to_string(call.k) + "; expected at most 2048";
  if (call.per_block < kGroup || (call.per_block & (call.per_block - 1))) {
    return "blocks of " + std::to_string(call.per_block) + " entries; expected a power of two from 16 on";
  }
  if (call.cos && call.pairs != kWidth / 4) return "angles of " + std::to_string(call.pairs) + " pairs; expected 32";
  if (call.num_blocks * call.per_block > INT32_MAX) return "a pool of 2^31 entries or more; expected fewer";
  const int64_t row = (call.max_entries + kTile - 1) / kTile * kTile / kGroup * (kGroup + 1);
  if (call.max_entries > call.k && call.tokens > 0 &&
      (call.scratch_row < row || call.scratch_row % 68 || call.scratch_tokens < 1)) {
    return "scratch of " + std::to_string(call.scratch_row) + " a token; expected " + std::to_string(row);
  }
  return "";
}

template <bool kPowers>
cudaError_t launch_scores(cudaStream_t stream, const SelectCall& call, const Piece& piece) {
  // Every time, here and below: attributes are those of the kernel on one device, and a process may have several.
  const cudaError_t prepared = cudaFuncSetAttribute(shared_score_kernel<kPowers>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kShared * kTokenBytes);
  if (prepared != cudaSuccess) return prepared;
  const bool share = piece.count >= kShareTokens;
  const int64_t groups = share ? (piece.count + kShared - 1) / kShared : piece.count;
  const int64_t tiles = (call.max_entries + kTile - 1) / kTile;
  // Where there is more than one tile for each warpgroup, thread blocks of four prepare queries half as often; where
  // there is not, two tiles a thread block.
  const bool large = !share && tiles * groups > kBlocks;
  const int64_t blocks = large ? kBlocks / 2 : kBlocks;
  const int64_t shares = std::max<int64_t>(1, std::min((tiles + 1) / 2, blocks / groups));
  const dim3 grid(static_cast<unsigned>(shares), static_cast<unsigned>(groups));
  if (share) {
    shared_score_kernel<kPowers><<<grid, kThreads, kShared * kTokenBytes, stream>>>(call, piece);
  } else if (large) {
    score_kernel<kPowers, 2 * kThreads><<<grid, 2 * kThreads, kTokenBytes, stream>>>(call, piece);
  } else {
    score_kernel<kPowers, kThreads><<<grid, kThreads, kTokenBytes, stream>>>(call, piece);
  }
  return cudaGetLastError();
}

inline cudaError_t launch(cudaStream_t stream, const SelectCall& call, int what = 7) {
  const cudaError_t prepared =
      cudaFuncSetAttribute(top_k_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kTopBytes);
  if (prepared != cudaSuccess) return prepared;
  Piece piece{};
  while (int64_t{1} << piece.shift < call.per_block) ++piece.shift;
  const bool scores = call.max_entries > call.k;
  const int64_t most = scores ? call.scratch_tokens : call.tokens;
  for (piece.first = 0; piece.first < call.tokens; piece.first += most) {
    piece.count = std::min(most, call.tokens - piece.first);
    if (scores && (what & 1)) {
      const cudaError_t status =
          call.group == 32 ? launch_scores<true>(stream, call, piece) : launch_scores<false>(stream, call, piece);
      if (status != cudaSuccess) return status;
    }
    if (!(what & 2)) continue;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(piece.count));
    config.blockDim = dim3(kTopThreads);
    config.dynamicSmemBytes = scores ? kTopBytes : 0;
    config.stream = stream;
    cudaLaunchAttribute overlap{};  // starts while the scores' kernel runs, and waits for it
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap, config.numAttrs = scores && (what & 4) ? 1 : 0;
    const cudaError_t status = cudaLaunchKernelEx(&config, top_k_kernel, call, piece);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

}  // namespace dsv4::select_sm90

#endif  // DSV4_SELECT_LAUNCH_CUH_
