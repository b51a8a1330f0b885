// attend on the CPU, for any geometry of FP8 records.
//
// Tokens of one request form tiles that share what is decoded; heads are shared out where there are few tiles. What a
// token and head sum, and in which order, follows from positions alone: rows by position in blocks of kBlock, then
// entries by index. So a result's bits do not depend on tiles, threads or company. Compiled with contraction (see
// CMakeLists.txt): nothing here is stored in the cache.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "attend/op.h"
#include "common/export.h"
#include "common/parallel_for.h"
#include "common/vector_clones.h"
#include "formats/float_math.h"
#include "read/decode_record.h"

namespace dsv4 {
namespace {

constexpr int64_t kBlock = 32;      // vectors decoded at a time: 64 KiB
constexpr int64_t kTileRows = 128;  // queries (tokens times heads) of a tile at most: 512 KiB with what they sum
constexpr int64_t kLanes = 8;
constexpr int64_t kHeadsAlone = 8;  // heads for which decoding once more is worth a thread

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
  friend Lanes operator+(Lanes a, const Lanes& b) { return a += b; }
  friend Lanes operator*(Lanes a, const Lanes& b) {
    for (int64_t i = 0; i < kLanes; ++i) a.x[i] *= b.x[i];
    return a;
  }
  friend Lanes operator*(float a, Lanes b) {
    for (int64_t i = 0; i < kLanes; ++i) b.x[i] *= a;
    return b;
  }
};
#define DSV4_INLINED inline
#endif

DSV4_INLINED const Lanes* lanes(const float* x) { return reinterpret_cast<const Lanes*>(x); }
DSV4_INLINED Lanes* lanes(float* x) { return reinterpret_cast<Lanes*>(x); }

DSV4_INLINED float sum_of(const Lanes& x) { return ((x[0] + x[4]) + (x[1] + x[5])) + ((x[2] + x[6]) + (x[3] + x[7])); }

DSV4_VECTOR_CLONES void decode_plain(const BFloat16* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(x[i]);
}

template <int M, int N>
DSV4_INLINED void score_tile(const float* q, const float* k, int64_t pitch, float scale, float* s) {
  Lanes sums[M][N] = {};
  for (int64_t i = 0; i < pitch; i += kLanes) {
    for (int m = 0; m < M; ++m) {
      for (int n = 0; n < N; ++n) sums[m][n] += *lanes(q + m * pitch + i) * *lanes(k + n * pitch + i);
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int n = 0; n < N; ++n) s[m * kBlock + n] = sum_of(sums[m][n]) * scale;
  }
}

template <int M>
DSV4_INLINED void score_rows(const float* q, const float* k, int64_t many, int64_t pitch, float scale, float* s) {
  int64_t n = 0;
  for (; n + 2 <= many; n += 2) score_tile<M, 2>(q, k + n * pitch, pitch, scale, s + n);
  if (n < many) score_tile<M, 1>(q, k + n * pitch, pitch, scale, s + n);
}

// s (heads, kBlock) = scale * q (heads, pitch) . k (many, pitch).
DSV4_VECTOR_CLONES void score(const float* q, int64_t heads, const float* k, int64_t many, int64_t pitch, float scale,
                              float* s) {
  int64_t m = 0;
  for (; m + 4 <= heads; m += 4) score_rows<4>(q + m * pitch, k, many, pitch, scale, s + m * kBlock);
  for (; m < heads; ++m) score_rows<1>(q + m * pitch, k, many, pitch, scale, s + m * kBlock);
}

// Scores to weights relative to the largest so far; what was summed before is worth `kept` times as much.
DSV4_VECTOR_CLONES void weigh(float* s, int64_t heads, int64_t many, float* top, float* total, float* kept) {
  for (int64_t h = 0; h < heads; ++h) {
    float* scores = s + h * kBlock;
    float most = top[h];
    for (int64_t n = 0; n < many; ++n) most = scores[n] > most ? scores[n] : most;
    kept[h] = most > top[h] ? exp_of_negative(top[h] - most) : 1.0f;
    for (int64_t n = 0; n < many; ++n) scores[n] = exp_of_negative(scores[n] - most);
    float sum = 0.0f;
    for (int64_t n = 0; n < many; ++n) sum += scores[n];
    top[h] = most, total[h] = total[h] * kept[h] + sum;
  }
}

DSV4_VECTOR_CLONES void multiply(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; ++i) x[i] *= by;
}

template <int M>
DSV4_INLINED void add_rows(const float* w, const float* v, int64_t many, int64_t pitch, const float* kept, float* out) {
  for (int64_t i = 0; i < pitch; i += 2 * kLanes) {
    Lanes sums[M][2] = {};
    for (int64_t n = 0; n < many; ++n) {
      for (int m = 0; m < M; ++m) {
        for (int j = 0; j < 2; ++j) sums[m][j] += w[m * kBlock + n] * *lanes(v + n * pitch + i + j * kLanes);
      }
    }
    for (int m = 0; m < M; ++m) {
      for (int j = 0; j < 2; ++j) {
        Lanes* to = lanes(out + m * pitch + i + j * kLanes);
        *to = kept[m] * *to + sums[m][j];
      }
    }
  }
}

// out (heads, pitch) = kept (heads) * out + w (heads, kBlock) . v (many, pitch). A block is summed by itself: errors
// grow with the number of blocks.
DSV4_VECTOR_CLONES void add_weighted(const float* w, int64_t heads, const float* v, int64_t many, int64_t pitch,
                                     const float* kept, float* out) {
  int64_t m = 0;
  for (; m + 4 <= heads; m += 4) add_rows<4>(w + m * kBlock, v, many, pitch, kept + m, out + m * pitch);
  for (; m < heads; ++m) add_rows<1>(w + m * kBlock, v, many, pitch, kept + m, out + m * pitch);
}

DSV4_VECTOR_CLONES float sum_of_squares(const float* x, int64_t pitch) {
  Lanes sums[4] = {};
  for (int64_t i = 0; i < pitch; i += kLanes) sums[i / kLanes % 4] += *lanes(x + i) * *lanes(x + i);
  sums[0] += sums[2], sums[1] += sums[3], sums[0] += sums[1];
  return sum_of(sums[0]);
}

// Consecutive tokens of one request, and some of the heads.
struct Tile {
  int64_t first, count;  // tokens: of the segment `segment`, or of the batch where that is -1
  int64_t segment;
  int64_t first_head, heads;
};

class Worker {
 public:
  explicit Worker(const AttendCall& call)
      : call_(call), pitch_((call.width + 2 * kLanes - 1) / (2 * kLanes) * 2 * kLanes) {
    vectors_.resize(static_cast<size_t>(kBlock * pitch_));
  }

  void operator()(const Tile& tile) {
    tile_ = tile;
    const int32_t slot = tile.segment < 0 ? call_.slots[tile.first] : call_.segment_slots[tile.segment];
    start_ = tile.segment < 0 ? call_.positions[tile.first] : call_.starts[tile.segment];
    if (!call_.is_slot(slot) || start_ < 0) return;  // zero already
    slot_ = slot;
    first_position_ = start_ + (tile.segment < 0 ? 0 : tile.first);
    begin();
    window();
    if (call_.has_entries) call_.selected ? chosen_entries() : all_entries();
    finish();
  }

 private:
  // Row of the batch of the tile's i-th token.
  int64_t token(int64_t i) const {
    if (tile_.segment < 0) return tile_.first;
    return call_.segment_tokens[tile_.segment * call_.per_segment + tile_.first + i];
  }
  int64_t position(int64_t i) const { return first_position_ + i; }
  int64_t row(int64_t i) const { return i * tile_.heads; }  // of q_ and out_

  void begin() {
    const int64_t rows = tile_.count * tile_.heads;
    q_.assign(static_cast<size_t>(rows * pitch_), 0.0f), out_.assign(static_cast<size_t>(rows * pitch_), 0.0f);
    top_.resize(rows), total_.resize(rows), kept_.resize(tile_.heads), scores_.resize(tile_.heads * kBlock);
    for (int64_t i = 0; i < tile_.count; ++i) {
      const int64_t t = token(i), from = (t * call_.heads + tile_.first_head) * call_.width;
      for (int64_t h = 0; h < tile_.heads; ++h) {
        float* q = q_.data() + (row(i) + h) * pitch_;
        const int64_t at = from + h * call_.width;
        if (call_.is_float) {
          std::copy_n(static_cast<const float*>(call_.q) + at, call_.width, q);
        } else {
          decode_plain(static_cast<const BFloat16*>(call_.q) + at, call_.width, q);
        }
        if (call_.cos) {
          const float mean = sum_of_squares(q, pitch_) / static_cast<float>(call_.width);
          multiply(q, call_.width, 1.0f / std::sqrt(mean + call_.eps));
          rotate(q, t, 1.0f);
        }
        top_[row(i) + h] = call_.sink[tile_.first_head + h], total_[row(i) + h] = 1.0f;
      }
    }
  }

  // The last values of x (width) as pairs, turned by the angles of token t, or back.
  void rotate(float* x, int64_t t, float direction) const {
    const float *cos = call_.cos + t * call_.pairs, *sin = call_.sin + t * call_.pairs;
    x += call_.width - 2 * call_.pairs;
    for (int64_t i = 0; i < call_.pairs; ++i) {
      const float even = x[2 * i], odd = x[2 * i + 1], turn = direction * sin[i];
      x[2 * i] = even * cos[i] - odd * turn;
      x[2 * i + 1] = even * turn + odd * cos[i];
    }
  }

  // The i-th token sees `many` of the decoded vectors, from `first` on.
  void step(int64_t i, int64_t first, int64_t many) {
    if (many <= 0) return;
    const float* vectors = vectors_.data() + first * pitch_;
    float *out = out_.data() + row(i) * pitch_, *s = scores_.data();
    score(q_.data() + row(i) * pitch_, tile_.heads, vectors, many, pitch_, call_.scale, s);
    weigh(s, tile_.heads, many, top_.data() + row(i), total_.data() + row(i), kept_.data());
    add_weighted(s, tile_.heads, vectors, many, pitch_, kept_.data(), out);
  }

  void window() {
    const int64_t last = position(tile_.count - 1), oldest = std::max<int64_t>(0, first_position_ - call_.window + 1);
    for (int64_t block = oldest / kBlock * kBlock; block <= last; block += kBlock) {
      for (int64_t p = std::max(block, oldest); p <= std::min(last, block + kBlock - 1); ++p) {
        float* out = vectors_.data() + (p - block) * pitch_;
        if (call_.has_fresh && p >= start_) {
          decode_record(call_.fresh, call_.segment_tokens[tile_.segment * call_.per_segment + p - start_], out);
        } else {
          decode_record(call_.ring, slot_ * call_.ring_rows + p % call_.ring_rows, out);
        }
      }
      for (int64_t i = 0; i < tile_.count; ++i) {
        const int64_t from = std::max({block, oldest, position(i) - call_.window + 1});
        step(i, from - block, std::min(position(i), block + kBlock - 1) - from + 1);
      }
    }
  }

  void all_entries() {
    const int64_t most = call_.visible(position(tile_.count - 1));
    int64_t entries[kBlock];
    for (int64_t block = 0; block < most; block += kBlock) {
      int64_t many = 0;
      for (int64_t e = block; e < std::min(most, block + kBlock); ++e) {
        const int64_t row = call_.entry_row(slot_, e);
        if (row < 0) continue;
        decode_record(call_.pool, row, vectors_.data() + many * pitch_);
        entries[many++] = e;
      }
      for (int64_t i = 0; i < tile_.count; ++i) {
        step(i, 0, std::lower_bound(entries, entries + many, call_.visible(position(i))) - entries);
      }
    }
  }

  void chosen_entries() {
    for (int64_t i = 0; i < tile_.count; ++i) {
      const int64_t visible = call_.visible(position(i));
      const int32_t* chosen = call_.selected + token(i) * call_.chosen;
      int64_t many = 0;
      for (int64_t k = 0; k < call_.chosen; ++k) {
        const int64_t row = chosen[k] >= 0 && chosen[k] < visible ? call_.entry_row(slot_, chosen[k]) : -1;
        if (row >= 0) decode_record(call_.pool, row, vectors_.data() + many++ * pitch_);
        if (many == kBlock) step(i, 0, many), many = 0;
      }
      step(i, 0, many);
    }
  }

  void finish() {
    for (int64_t i = 0; i < tile_.count; ++i) {
      const int64_t t = token(i), to = (t * call_.heads + tile_.first_head) * call_.width;
      for (int64_t h = 0; h < tile_.heads; ++h) {
        float* out = out_.data() + (row(i) + h) * pitch_;
        multiply(out, call_.width, 1.0f / total_[row(i) + h]);
        if (call_.cos) rotate(out, t, -1.0f);
        const int64_t at = to + h * call_.width;
        if (call_.is_float) {
          std::copy_n(out, call_.width, static_cast<float*>(call_.out) + at);
        } else {
          BFloat16* to_bits = static_cast<BFloat16*>(call_.out) + at;
          for (int64_t d = 0; d < call_.width; ++d) to_bits[d] = to_bf16(out[d]);
        }
      }
    }
  }

  const AttendCall& call_;
  const int64_t pitch_;  // floats from one vector to the next, zero beyond its width
  Tile tile_{};
  int64_t slot_ = 0, start_ = 0, first_position_ = 0;  // start_: of the segment
  std::vector<float> vectors_, q_, out_, top_, total_, kept_, scores_;
};

// Clears what no tile writes, the output of padding; an error if the segments are not those of the tokens.
ffi::Error clear_padding(const AttendCall& call) {
  const int64_t bytes = call.heads * call.width * (call.is_float ? 4 : 2);
  int64_t live = 0;
  for (int64_t t = 0; t < call.tokens; ++t) {
    const bool in_segment = !call.has_fresh || call.segment_rows[t] < call.num_segments * call.per_segment;
    if (in_segment && call.is_slot(call.slots[t]) && call.positions[t] >= 0) {
      ++live;
    } else {
      std::memset(static_cast<char*>(call.out) + t * bytes, 0, static_cast<size_t>(bytes));
    }
  }
  bool fits = true;
  for (int64_t s = 0; call.has_fresh && s < call.num_segments; ++s) {
    if (!call.is_slot(call.segment_slots[s]) || call.starts[s] < 0) continue;
    live -= call.counts[s], fits &= call.counts[s] <= call.per_segment;
    for (int64_t c = 0; fits && c < call.counts[s]; ++c) {
      const int64_t t = call.segment_tokens[s * call.per_segment + c];
      fits = t >= 0 && t < call.tokens;
    }
  }
  if (fits && (!call.has_fresh || live == 0)) return ffi::Error::Success();
  return ffi::Error::InvalidArgument("attend: got segments of other tokens; expected each live token in one segment.");
}

std::vector<Tile> tiles_of(const AttendCall& call, int64_t threads) {
  std::vector<Tile> tiles;
  const auto share_heads = [&](int64_t first, int64_t count, int64_t segment, int64_t heads) {
    for (int64_t h = 0; h < call.heads; h += heads) {
      tiles.push_back({first, count, segment, h, std::min(heads, call.heads - h)});
    }
  };
  const int64_t most = std::clamp<int64_t>(kTileRows / std::max<int64_t>(1, call.heads), 1, 16);
  int64_t without_shares = call.tokens;
  if (call.has_fresh) {
    without_shares = 0;
    for (int64_t s = 0; s < call.num_segments; ++s) without_shares += (call.counts[s] + most - 1) / most;
  }
  int64_t shares = std::max<int64_t>(1, threads / std::max<int64_t>(1, without_shares));
  shares = std::clamp<int64_t>(shares, 1, std::max<int64_t>(1, call.heads / kHeadsAlone));
  const int64_t heads = std::max<int64_t>(1, (call.heads + shares - 1) / shares);
  if (!call.has_fresh) {
    for (int64_t t = 0; t < call.tokens; ++t) share_heads(t, 1, -1, heads);
    return tiles;
  }
  for (int64_t s = 0; s < call.num_segments; ++s) {
    const int64_t count = std::min<int64_t>(call.counts[s], call.per_segment);
    for (int64_t c = 0; c < count; c += most) share_heads(c, std::min(most, count - c), s, heads);
  }
  return tiles;
}

ffi::Error attend(ffi::ThreadPool pool, ffi::RemainingArgs args, ffi::RemainingRets results,
                  const AttendAttributes& attributes) {
  AttendCall call;
  ffi::Error error = bind_attend(args, results, attributes, &call);
  if (error.success()) error = clear_padding(call);
  if (error.failure()) return error;
  const std::vector<Tile> tiles = tiles_of(call, pool.num_threads());
  parallel_for(pool, static_cast<int64_t>(tiles.size()), 1, [&](int64_t begin, int64_t end) {
    Worker work(call);
    for (int64_t i = begin; i < end; ++i) work(tiles[static_cast<size_t>(i)]);
  });
  return error;
}

}  // namespace
}  // namespace dsv4

DSV4_CPU_HANDLER(Dsv4Attend, dsv4::attend, .Attrs<dsv4::AttendAttributes>());
