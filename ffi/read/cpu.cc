// read_window, read_entries and read_keys on the CPU, for any geometry.
#include <algorithm>

#include "common/export.h"
#include "common/parallel_for.h"
#include "formats/key_rows.h"
#include "read/decode_record.h"
#include "read/op.h"

namespace dsv4 {
namespace {

constexpr int64_t kBytesPerChunk = 128 << 10;  // of the result: some 10 us of work

// decode(row, out) fills one of call.vectors() vectors of `width` values each.
template <typename Call, typename Rows, typename Out, typename Decode>
void read_all(ffi::ThreadPool& pool, const Call& call, const Rows& rows, int64_t width, Out* out,
              const Decode& decode) {
  const int64_t bytes = std::max<int64_t>(1, width * static_cast<int64_t>(sizeof(Out)));
  parallel_for(pool, call.vectors(), std::max<int64_t>(1, kBytesPerChunk / bytes), [&](int64_t begin, int64_t end) {
    for (int64_t v = begin; v < end; ++v) {
      const int64_t row = rows.row(v / call.per_request, v % call.per_request);
      row < 0 ? void(std::fill_n(out + v * width, width, Out{})) : decode(row, out + v * width);
    }
  });
}

template <typename Rows>
void read_records(ffi::ThreadPool& pool, const ReadRecords& call, const Rows& rows) {
  const int64_t width = call.nope_width + call.rope_width;
  const auto decode = [&](int64_t row, auto* out) { decode_record(call, row, out); };
  call.out_is_float ? read_all(pool, call, rows, width, static_cast<float*>(call.out), decode)
                    : read_all(pool, call, rows, width, static_cast<BFloat16*>(call.out), decode);
}

ffi::Error read_window(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer,
                       int64_t window) {
  ReadRecords call;
  WindowRows rows;
  const ffi::Error error = bind_read_window(args, results, layer, window, &call, &rows);
  if (error.success()) read_records(pool, call, rows);
  return error;
}

ffi::Error read_entries(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadRecords call;
  EntryRows rows;
  const ffi::Error error = bind_read_entries(args, results, layer, &call, &rows);
  if (error.success()) read_records(pool, call, rows);
  return error;
}

ffi::Error read_keys(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results, int64_t layer) {
  ReadKeys call;
  EntryRows rows;
  const ffi::Error error = bind_read_keys(args, results, layer, &call, &rows);
  if (error.success()) {
    read_all(pool, call, rows, call.dim, call.out, [&](int64_t row, float* out) {
      decode_key(call.keys + row * (call.dim / 2), call.scale + row * (call.dim / call.group), call.dim, call.group,
                 out);
    });
  }
  return error;
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4ReadWindow, dsv4::read_window, .Attr<int64_t>("layer").Attr<int64_t>("window"));
DSV4_CPU_HANDLER(Dsv4ReadEntries, dsv4::read_entries, .Attr<int64_t>("layer"));
DSV4_CPU_HANDLER(Dsv4ReadKeys, dsv4::read_keys, .Attr<int64_t>("layer"));
