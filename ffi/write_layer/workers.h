// The work of the CPU handlers, for those that do several in one call.
#ifndef DSV4_WRITE_LAYER_WORKERS_H_
#define DSV4_WRITE_LAYER_WORKERS_H_

#include "append_swa/op.h"
#include "compress/op.h"

namespace dsv4 {

void write_tokens(ffi::ThreadPool& pool, const AppendSwa& call);
void write_entries(ffi::ThreadPool& pool, const Compress& call, const RecordRows& record);
void write_keys(ffi::ThreadPool& pool, const Compress& call, const KeyRows& keys);

}  // namespace dsv4

#endif  // DSV4_WRITE_LAYER_WORKERS_H_
