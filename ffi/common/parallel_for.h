// A parallel loop over XLA's own threads.
#ifndef DSV4_COMMON_PARALLEL_FOR_H_
#define DSV4_COMMON_PARALLEL_FOR_H_

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace dsv4 {

// Calls body(begin, end) for chunks of at most `chunk` that cover [0, n), and returns when all are done. The caller
// works too and waits only for chunks that some thread has taken up, so it is safe on a thread of the pool itself.
template <typename Body>
void parallel_for(xla::ffi::ThreadPool& pool, int64_t n, int64_t chunk, const Body& body) {
  const int64_t chunks = (n + chunk - 1) / chunk;
  const int64_t helpers = std::min(chunks, pool.num_threads()) - 1;
  if (helpers <= 0) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto state = std::make_shared<State>();
  // A helper that starts after the caller has left finds no chunk, and touches nothing but `state`.
  const auto work = [state, chunks, chunk, n, &body] {
    int64_t finished = 0;
    for (int64_t i = state->next++; i < chunks; i = state->next++, ++finished) {
      body(i * chunk, std::min(n, (i + 1) * chunk));
    }
    if (!finished) return;
    std::lock_guard<std::mutex> lock(state->mutex);
    state->done += finished;
    if (state->done == chunks) state->all_done.notify_all();
  };
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == chunks; });
}

}  // namespace dsv4

#endif  // DSV4_COMMON_PARALLEL_FOR_H_
