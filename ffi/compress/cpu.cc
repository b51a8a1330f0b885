// compress and compress_indexer on the CPU, for any geometry.
#include "common/export.h"
#include "common/parallel_for.h"
#include "compress/full_tail.h"
#include "compress/op.h"
#include "compress/running_tail.h"
#include "formats/key_rows.h"
#include "formats/record_rows.h"
#include "write_layer/workers.h"

namespace dsv4 {
namespace {

template <typename Worker, typename Write>
void run_as(ffi::ThreadPool& pool, const Compress& call, const Write& write) {
  const int64_t shares = workers_per_segment(call);
  parallel_for(pool, call.segments * shares, 2, [&](int64_t begin, int64_t end) {
    Worker worker(call);
    for (int64_t i = begin; i < end; ++i) worker.run(i / shares, i % shares, write);
  });
}

template <typename Write>
void run(ffi::ThreadPool& pool, const Compress& call, const Write& write) {
  if (call.sums) {
    call.kv_is_float ? run_as<RunningTailWorker<float>>(pool, call, write)
                     : run_as<RunningTailWorker<BFloat16>>(pool, call, write);
  } else {
    call.kv_is_float ? run_as<FullTailWorker<float>>(pool, call, write)
                     : run_as<FullTailWorker<BFloat16>>(pool, call, write);
  }
}

}  // namespace

void write_entries(ffi::ThreadPool& pool, const Compress& call, const RecordRows& record) {
  run(pool, call, [&](int64_t row, const float* values) { write_record(record, row, values); });
}

void write_keys(ffi::ThreadPool& pool, const Compress& call, const KeyRows& keys) {
  run(pool, call, [&](int64_t row, float* values) { write_key(keys, row, values); });
}

namespace {

ffi::Error compress(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                    float eps) {
  Compress call;
  RecordRows record;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record);
  if (error.success()) write_entries(pool, call, record);
  return error;
}

ffi::Error compress_indexer(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps, bool rotate) {
  Compress call;
  KeyRows keys;
  const ffi::Error error = bind_compress_indexer(args, results, layer, eps, rotate, &call, &keys);
  if (error.success()) write_keys(pool, call, keys);
  return error;
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4Compress, dsv4::compress, .Attr<int64_t>("layer").Attr<float>("eps"));
DSV4_CPU_HANDLER(Dsv4CompressIndexer, dsv4::compress_indexer,
                 .Attr<int64_t>("layer").Attr<float>("eps").Attr<bool>("rotate"));
