// Finishing an entry of compress in a block.
#ifndef DSV4_ENTRY_IN_BLOCK_CUH_
#define DSV4_ENTRY_IN_BLOCK_CUH_

#include "compress/op.h"
#include "cuda/record_in_block.cuh"

namespace dsv4 {

struct FinishRecord {
  static constexpr int kThreads = RecordInBlock::kThreads;
  using Scratch = RecordInBlock::Scratch;
  using Constants = RecordInBlock::Constants;

  RecordRows record;

  static __device__ __forceinline__ void load(const Compress& call, int64_t window, int thread, Constants* constants) {
    const int64_t pair = window * (kRecordRopeDim / 2);
    constants->load(call.norm, call.cos + pair, call.sin + pair, thread);
  }
  __device__ __forceinline__ void operator()(const Compress& call, const Constants& constants, int64_t row, int thread,
                                             float (&v)[2], Scratch* scratch) const {
    RecordInBlock::normalise(v, constants, call.eps, thread, scratch);
    RecordInBlock::write(record, row, v, thread, scratch);
  }
};

}  // namespace dsv4

#endif  // DSV4_ENTRY_IN_BLOCK_CUH_
