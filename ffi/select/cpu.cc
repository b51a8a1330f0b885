// select on the CPU, for FP4 keys of any width.
//
// First the scores of some tokens, in tasks of a few tokens of one request and a range of its keys, which are decoded
// once for all of them; then the best of each token. What a score sums, and in which order, follows from its token and
// key alone. Compiled with contraction (see CMakeLists.txt): nothing here is stored in the cache.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "common/export.h"
#include "common/parallel_for.h"
#include "common/vector_clones.h"
#include "formats/key_rows.h"
#include "select/op.h"

namespace dsv4 {
namespace {

constexpr int64_t kLanes = 8;
constexpr int64_t kKeys = 32;        // decoded at a time
constexpr int64_t kTileTokens = 16;  // that share them at most
constexpr int64_t kTaskKeys = 1024;  // of a task

struct Task {
  int64_t first, count;  // tokens
  int64_t from, to;      // entries
};

#ifdef __GNUC__
typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
#define DSV4_INLINED inline __attribute__((always_inline))
#else
struct Lanes {
  float x[kLanes];
  float operator[](int64_t i) const { return x[i]; }
  Lanes& operator+=(const Lanes& b) {
    for (int64_t i = 0; i < kLanes; ++i) x[i] += b.x[i];
    return *this;
  }
  friend Lanes operator*(Lanes a, const Lanes& b) {
    for (int64_t i = 0; i < kLanes; ++i) a.x[i] *= b.x[i];
    return a;
  }
};
#define DSV4_INLINED inline
#endif

DSV4_INLINED const Lanes* lanes(const float* x) { return reinterpret_cast<const Lanes*>(x); }

// scores[0 ... N - 1] += the sum over M heads of weight * relu(q . key).
template <int M, int N>
DSV4_INLINED void score_tile(const float* keys, const float* q, const float* weights, int64_t width, float* scores) {
  Lanes sums[M][N] = {};
  for (int64_t i = 0; i < width; i += kLanes) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[m][n] += *lanes(q + m * width + i) * *lanes(keys + n * width + i);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) {
      const Lanes& s = sums[m][n];
      const float x = ((s[0] + s[4]) + (s[1] + s[5])) + ((s[2] + s[6]) + (s[3] + s[7]));
      scores[n] += weights[m] * (x < 0.0f ? 0.0f : x);  // a NaN is not below 0, and stays
    }
  }
}

// keys (kKeys, width), q (heads, width): scores (kKeys) = the weighted sum over heads, in their order.
DSV4_VECTOR_CLONES void score_keys(const float* keys, const float* q, const float* weights, int64_t heads,
                                   int64_t width, float* scores) {
  for (int64_t n = 0; n < kKeys; n += 2) {
    scores[n] = scores[n + 1] = 0.0f;
    int64_t h = 0;
    for (; h + 4 <= heads; h += 4) score_tile<4, 2>(keys + n * width, q + h * width, weights + h, width, scores + n);
    for (; h < heads; ++h) score_tile<1, 2>(keys + n * width, q + h * width, weights + h, width, scores + n);
  }
}

// What is not finite becomes NaN.
float finite(float x) { return x - x == 0.0f ? x : std::numeric_limits<float>::quiet_NaN(); }

class Scorer {
 public:
  explicit Scorer(const SelectCall& call) : call_(call), keys_(static_cast<size_t>(call.width * kKeys)) {}

  // Into scores, of `pitch` values a token from `base` on; -infinity where an entry has no block.
  void operator()(const Task& task, float* scores, int64_t pitch, int64_t base) {
    q_.assign(static_cast<size_t>(task.count * call_.heads * call_.width), 0.0f);
    weights_.resize(static_cast<size_t>(task.count * call_.heads));
    for (int64_t i = 0; i < task.count; ++i) prepare(task.first + i, i);
    const int64_t slot = call_.slots[task.first];
    for (int64_t block = task.from; block < task.to; block += kKeys) {
      const int64_t many = std::min(kKeys, task.to - block);
      bool given[kKeys] = {};
      for (int64_t i = 0; i < kKeys; ++i) {
        const int64_t row = i < many ? call_.key_row(slot, block + i) : -1;
        given[i] = row >= 0;
        decode(row, i);
      }
      for (int64_t t = 0; t < task.count; ++t) {
        if (call_.visible(task.first + t) <= std::max(block, call_.k)) continue;
        float sums[kKeys];
        score_keys(keys_.data(), q_.data() + t * call_.heads * call_.width, weights_.data() + t * call_.heads,
                   call_.heads, call_.width, sums);
        float* out = scores + (task.first + t - base) * pitch + block;
        for (int64_t i = 0; i < many; ++i) out[i] = given[i] ? sums[i] : -std::numeric_limits<float>::infinity();
      }
    }
  }

 private:
  // The query of a token, rotated; its weights, with the factors of the score.
  void prepare(int64_t token, int64_t to) {
    const int64_t width = call_.width, pairs = call_.cos ? call_.pairs : 0;
    for (int64_t h = 0; h < call_.heads; ++h) {
      float* x = q_.data() + (to * call_.heads + h) * width;
      const int64_t at = (token * call_.heads + h) * width;
      for (int64_t d = 0; d < width; ++d) {
        x[d] = finite(call_.is_float ? static_cast<const float*>(call_.q)[at + d]
                                     : to_float(static_cast<const BFloat16*>(call_.q)[at + d]));
      }
      for (int64_t i = 0; i < pairs; ++i) {
        const float cos = call_.cos[token * pairs + i], sin = call_.sin[token * pairs + i];
        float* pair = x + width - 2 * pairs + 2 * i;
        const float even = pair[0] * cos - pair[1] * sin, odd = pair[0] * sin + pair[1] * cos;
        pair[0] = even, pair[1] = odd;
      }
      for (int64_t stride = 1; stride < width; stride *= 2) {
        for (int64_t i = 0; i < width; i += 2 * stride) {
          for (int64_t j = i; j < i + stride; ++j) {
            const float a = x[j], b = x[j + stride];
            x[j] = a + b, x[j + stride] = a - b;
          }
        }
      }
      // Hadamard's 1 / sqrt(d), and the score's.
      const float weight = finite(call_.weights[token * call_.heads + h]);
      weights_[to * call_.heads + h] = weight / static_cast<float>(width);
    }
  }

  // Key `row` of the pool into row i; zeros for -1.
  void decode(int64_t row, int64_t i) {
    const int64_t width = call_.width;
    float* out = keys_.data() + i * width;
    if (row < 0) {
      std::fill_n(out, width, 0.0f);
    } else {
      decode_key(call_.keys + row * (width / 2), call_.scale + row * (width / call_.group), width, call_.group, out);
    }
  }

  const SelectCall& call_;
  std::vector<float> keys_, q_, weights_;  // keys_: (kKeys, width)
};

// An integer that orders as scores do: NaN is the best, -0 is 0.
uint32_t order_of(float score) {
  if (score != score) return 0xFFFFFFFFu;
  const uint32_t bits = bits_of(score + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The k best of n scores, equal ones by lower index, in the order of the index.
void choose(const SelectCall& call, int64_t token, const float* scores, std::vector<uint32_t>& order,
            std::vector<uint32_t>& sorted) {
  const int64_t slot = call.slots[token], n = call.visible(token), k = call.k;
  int32_t* out = call.selected + token * k;
  int64_t found = 0;
  if (n <= k) {
    for (int64_t i = 0; i < k; ++i) out[i] = i < n && call.key_row(slot, i) >= 0 ? static_cast<int32_t>(i) : -1;
    return;
  }
  order.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[i] = order_of(scores[i]);
  sorted = order;
  const auto last = sorted.begin() + (k - 1);
  std::nth_element(sorted.begin(), last, sorted.end(), std::greater<uint32_t>());
  const uint32_t least = *last;
  int64_t equal = k - std::count_if(sorted.begin(), last, [&](uint32_t x) { return x > least; });
  for (int64_t i = 0; i < n; ++i) {
    if (order[i] < least || (order[i] == least && equal-- <= 0)) continue;
    // An entry without a block is chosen last, and is none.
    if (call.key_row(slot, i) >= 0) out[found++] = static_cast<int32_t>(i);
  }
  std::fill(out + found, out + k, -1);
}

ffi::Error select(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                  const SelectAttributes& attributes) {
  SelectCall call;
  const ffi::Error error = bind_select(args, results, attributes, &call);
  if (error.failure()) return error;
  if (call.width % kLanes || call.width & (call.width - 1)) {
    return ffi::Error::InvalidArgument("select: got keys of another width; expected a power of two from 8 on.");
  }
  const int64_t pitch = call.scratch_row;
  const int64_t most = call.scratch ? call.scratch_tokens : std::max<int64_t>(1, call.tokens);
  auto* const scores = reinterpret_cast<float*>(call.scratch);
  std::vector<Task> tasks;
  for (int64_t base = 0; base < call.tokens; base += most) {
    const int64_t end = std::min(call.tokens, base + most);
    tasks.clear();
    for (int64_t t = base; t < end;) {
      int64_t next = t, seen = 0;
      for (; next < end && next - t < kTileTokens && call.slots[next] == call.slots[t]; ++next) {
        seen = std::max<int64_t>(seen, call.visible(next));
      }
      for (int64_t e = 0; seen > attributes.k && e < seen; e += kTaskKeys) {
        tasks.push_back({t, next - t, e, std::min(seen, e + kTaskKeys)});
      }
      t = next;
    }
    parallel_for(pool, static_cast<int64_t>(tasks.size()), 1, [&](int64_t begin, int64_t stop) {
      Scorer score(call);
      for (int64_t i = begin; i < stop; ++i) score(tasks[static_cast<size_t>(i)], scores, pitch, base);
    });
    parallel_for(pool, end - base, tasks.empty() ? end - base : 1, [&](int64_t begin, int64_t stop) {
      std::vector<uint32_t> order, sorted;
      for (int64_t i = begin; i < stop; ++i) choose(call, base + i, scores + i * pitch, order, sorted);
    });
  }
  return error;
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4Select, dsv4::select, .Attrs<dsv4::SelectAttributes>());
