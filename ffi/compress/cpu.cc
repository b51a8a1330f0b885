// compress and compress_indexer on the CPU, for any geometry.
#include <algorithm>
#include <cmath>

#include "common/export.h"
#include "common/parallel_for.h"
#include "compress/full_tail.h"
#include "compress/op.h"
#include "compress/running_tail.h"
#include "formats/float_math.h"
#include "formats/fp4.h"
#include "formats/quantise.h"
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
void run(ffi::ThreadPool& pool, const Compress& call, bool kv_is_float, const Write& write) {
  if (call.sums) {
    kv_is_float ? run_as<RunningTailWorker<float>>(pool, call, write)
                : run_as<RunningTailWorker<BFloat16>>(pool, call, write);
  } else {
    kv_is_float ? run_as<FullTailWorker<float>>(pool, call, write)
                : run_as<FullTailWorker<BFloat16>>(pool, call, write);
  }
}

// Times the orthonormal Hadamard matrix in natural order; n is a power of two.
void rotate(float* x, int64_t n) {
  for (int64_t stride = 1; stride < n; stride *= 2) {
    for (int64_t i = 0; i < n; ++i) {
      if (i & stride) continue;
      const float a = x[i], b = x[i + stride];
      x[i] = a + b;
      x[i + stride] = a - b;
    }
  }
  const float scale = divide(1.0f, std::sqrt(static_cast<float>(n)));
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
}

void write_key(const KeyRows& keys, int64_t dim, int64_t row, float* x) {
  if (keys.rotate) rotate(x, dim);
  uint8_t* codes = keys.keys + row * (dim / 2);
  for (int64_t first = 0; first < dim; first += keys.group) {
    uint32_t amax = 0;
    for (int64_t i = first; i < first + keys.group; ++i) amax = std::max(amax, magnitude_bits(x[i]));
    const GroupScale scale(amax, keys.group == 16);
    keys.scale[row * (dim / keys.group) + first / keys.group] = scale.byte;
    for (int64_t i = first; i < first + keys.group; i += 2) {
      codes[i / 2] = static_cast<uint8_t>(scale.encode(x[i]) | (scale.encode(x[i + 1]) << 4));
    }
  }
}

}  // namespace

void write_entries(ffi::ThreadPool& pool, const Compress& call, const RecordRows& record, bool kv_is_float) {
  const int64_t rope_dim = call.rope_dim, nope_dim = call.dim - rope_dim;
  run(pool, call, kv_is_float, [&](int64_t row, const float* values) {
    uint8_t* nope = record.nope + row * nope_dim;
    if (record.scales) {
      quantise_row_by_groups(values, nope_dim, nope, record.scales + row * record.scale_width, record.scale_width);
    } else {
      record.inv_scale[row] = quantise_row(values, nope_dim, nope);
    }
    for (int64_t i = 0; i < rope_dim; ++i) record.rope[row * rope_dim + i] = to_bf16(values[nope_dim + i]);
  });
}

void write_keys(ffi::ThreadPool& pool, const Compress& call, const KeyRows& keys, bool kv_is_float) {
  run(pool, call, kv_is_float, [&](int64_t row, float* values) { write_key(keys, call.dim, row, values); });
}

namespace {

ffi::Error compress(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer, float eps) {
  Compress call;
  RecordRows record;
  bool kv_is_float;
  const ffi::Error error = bind_compress(args, results, layer, eps, &call, &record, &kv_is_float);
  if (error.success()) write_entries(pool, call, record, kv_is_float);
  return error;
}

ffi::Error compress_indexer(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                            float eps, bool rotate) {
  Compress call;
  KeyRows keys;
  bool kv_is_float;
  const ffi::Error error = bind_compress_indexer(args, results, layer, eps, rotate, &call, &keys, &kv_is_float);
  if (error.success()) write_keys(pool, call, keys, kv_is_float);
  return error;
}

}  // namespace
}  // namespace dsv4

DSV4_EXPORT_HANDLER(Dsv4Compress);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4Compress, dsv4::compress,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps"));
DSV4_EXPORT_HANDLER(Dsv4CompressIndexer);
XLA_FFI_DEFINE_HANDLER_SYMBOL(Dsv4CompressIndexer, dsv4::compress_indexer,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("layer")
                                  .Attr<float>("eps")
                                  .Attr<bool>("rotate"));
