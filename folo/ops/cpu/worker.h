// One thread's attention: query tiles against tiles of keys, and what they come to.
//
// Keys go in tiles of kKeys from position 0 upward, whatever the block size. Each tile gives a row its own
// maximum, sum and weighted values (softmax within the tile); tiles are then merged in order, as in Milakov &
// Gimelshein 2018. Within a tile, scores sum over the head dimension in order, and values over the keys in
// order; a key that a row does not see has weight 0, which adds nothing. Weights are powers of two of scores
// times log2(e), in float32; bfloat16 products round them, as in flash attention.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "blocks.h"
#include "kernels.h"
#include "plan.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {

constexpr int kScoreGroups = 2;                 // vectors of keys that a block of rows is scored against
constexpr int kScoreStride = kKeys + 16;        // from row to row: not a power of two, or they share cache lines
constexpr int kWeightStride = kKeys + 32;
constexpr float kLog2E = 1.44269504088896341f;
constexpr int kScoreRows = kLanes == 16 ? 8 : 4;
constexpr int kValueRows = kLanes == 16 ? 6 : 3;
constexpr int kValueVectors = 4;                // of the head dimension that a block of rows sums at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

// To whole vectors and tiles.
inline int64_t padded(int64_t x) { return (x + 15) / 16 * 16; }

// What a query tile has gathered of the keys so far, or of one tile of them.
struct Part {
  float *top, *total, *sums;  // [rows], [rows], [rows, width]
};

template <typename T>
class Worker {
  using A = Arithmetic<T>;
  using Unit = typename A::Unit;

 public:
  explicit Worker(const Attention& a)
      : a_(a),
        group_(a.num_heads / a.num_kv_heads),
        width_(padded(a.head_dim)),
        depth_(padded((a.head_dim + A::kPer - 1) / A::kPer)) {
    take();
    scratch_.allocate();
    take();
    std::memset(static_cast<void*>(blank_), 0, size_t(depth_ * A::kPer) * sizeof(T));
  }

  Part own() const { return own_; }

  // Take the rows of a query tile, which have seen nothing yet.
  void start(const Tile& tile) {
    tile_ = tile;
    const T* q = static_cast<const T*>(a_.q);
    int64_t r = 0;
    for (const Member* m = tile.members; m < tile.members + tile.num_members; ++m) {
      const int64_t begin = a_.query_start[m->sequence], tokens = a_.query_start[m->sequence + 1] - begin;
      for (int64_t row = m->first; row < m->first + m->rows; ++row, ++r) {
        row_place_[r] = ((begin + row / group_) * a_.num_heads + tile.head * group_ + row % group_) * a_.head_dim;
        position_[r] = a_.seq_lens[m->sequence] - tokens + row / group_;
        Unit* to = queries_ + r * depth_;
        for (int64_t i = 0; i < depth_; ++i) to[i] = 0;
        if constexpr (A::kPer == 2) {
          std::memcpy(to, q + row_place_[r], size_t(a_.head_dim) * sizeof(T));
        } else {
          for (int64_t i = 0; i < a_.head_dim; ++i) to[i] = folo::widen(q[row_place_[r] + i]);
        }
      }
    }
    std::fill_n(sum_.top, tile.rows, kNone);
    std::fill_n(sum_.total, tile.rows, 0.0f);
    std::fill_n(sum_.sums, tile.rows * width_, 0.0f);
  }

  // What the keys of a span alone give to its rows; the first row that sees any of them. `next`: the span that
  // comes after, if one does, and its tile: to be fetched in time.
  int64_t span(const Span& span, const Span* next, int64_t next_head, Part to) {
    const int64_t start = span.number * kKeys;
    const int64_t first = std::lower_bound(position_ + span.begin, position_ + span.end, start) - position_;
    const int count = int(span.count);
    locate(span, tile_.head, place_);
    coming_ = next ? int(next->count) : 0;
    fetched_ = 0;
    if (next) locate(*next, next_head, next_place_);
    score(first, span.end, count);
    for (int64_t r = first; r < span.end; ++r) {
      fetch_keys(int(coming_ / 2 * (r + 1 - first) / (span.end - first)));
      weigh(r, int(std::min<int64_t>(kKeys, position_[r] + 1 - start)), count, to);
    }
    value(first, span.end, count, to);
    return first;
  }

  // `next`, of rows [first, end), added to what the keys before came to.
  void merge(Part next, int64_t first, int64_t end) {
    alignas(64) float old_scale[kLanes], new_scale[kLanes];
    for (int64_t at = first; at < end; at += kLanes) {
      const Float before = load(sum_.top + at), own = load(next.top + at), top = max(before, own);
      const Float shrunk = exp2(before - top), added = exp2(own - top);
      const Float total = load(sum_.total + at) * shrunk + load(next.total + at) * added;
      const int rows = int(std::min<int64_t>(kLanes, end - at));
      store(old_scale, shrunk);
      store(new_scale, added);
      store(sum_.top + at, top, rows);
      store(sum_.total + at, total, rows);
      for (int64_t r = at; r < at + rows; ++r) {
        float *to = sum_.sums + r * width_, *from = next.sums + r * width_;
        const Float kept = all(old_scale[r - at]), taken = all(new_scale[r - at]);
        for (int64_t i = 0; i < width_; i += kLanes) store(to + i, load(to + i) * kept + load(from + i) * taken);
      }
    }
  }

  void finish() const {
    for (int64_t r = 0; r < tile_.rows; ++r) {
      T* to = static_cast<T*>(a_.out) + row_place_[r];
      const Float total = all(sum_.total[r] == 0 ? 1 : sum_.total[r]);  // 0: a padding row, which saw no key
      for (int64_t i = 0; i < a_.head_dim; i += kLanes) {
        Float value = load(sum_.sums + r * width_ + i) / total;
        int64_t left = a_.head_dim - i;
        if (left >= kLanes) {
          store(to + i, value);
        } else {
          store(to + i, value, int(left));
        }
      }
    }
  }

  int64_t floats_of_part() const { return kQueries * width_ + 2 * kTops; }
  Part part_at(float* memory) const { return {memory, memory + kTops, memory + 2 * kTops}; }

 private:
  static constexpr int kTops = kQueries + kLanes;  // whole vectors from any row on

  void take() {
    queries_ = scratch_.take<Unit>(kQueries * depth_);
    position_ = scratch_.take<int64_t>(kQueries);
    row_place_ = scratch_.take<int64_t>(kQueries);
    blank_ = scratch_.take<T>(depth_ * A::kPer);
    place_ = scratch_.take<int64_t>(kKeys);
    next_place_ = scratch_.take<int64_t>(kKeys);
    keys_ = scratch_.take<float>(depth_ * kScoreGroups * kLanes);
    scores_ = scratch_.take<float>(kQueries * kScoreStride);
    weights_ = scratch_.take<typename A::Weight>(kQueries * kWeightStride);
    values_ = scratch_.take<float>(kKeys / A::kPer * width_);
    own_ = part_at(scratch_.take<float>(floats_of_part()));
    sum_ = part_at(scratch_.take<float>(floats_of_part()));
  }

  // Where the keys of a span lie, in elements from the start of the caches.
  void locate(const Span& span, int64_t head, int64_t* place_of) const {
    const int64_t start = span.number * kKeys, count = span.count;
    const int32_t* table = a_.block_tables + span.sequence * a_.table_width + start / a_.block_size;
    const auto& strides = a_.strides;
    int64_t offset = start % a_.block_size;
    for (int64_t j = 0; j < count; offset = 0, ++table) {
      int64_t place = *table * strides.block + offset * strides.slot + head * strides.head;
      for (const int64_t end = std::min(count, j + a_.block_size - offset); j < end; ++j, place += strides.slot)
        place_of[j] = place;
    }
  }

  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // of a cache, in elements

  // A line of K or V to come. Heads lie apart: no prefetcher of the CPU follows them far.
  static void fetch(const void* cache, int64_t at) {
    _mm_prefetch(static_cast<const char*>(cache) + at * int64_t(sizeof(T)), _MM_HINT_T1);
  }

  // The next span's keys up to one of them: as many as there is work for in the meantime.
  void fetch_keys(int end) {
    for (; fetched_ < end; ++fetched_)
      for (int64_t e = 0; e < a_.head_dim; e += kLine) fetch(a_.k_cache, next_place_[fetched_] + e);
  }

  // Scores of rows [first, end) with keys 0 to `count`, which take their places in lanes.
  void score(int64_t first, int64_t end, int count) {
    constexpr int kStep = kScoreGroups * kLanes;
    for (int j = 0; j < count; j += kStep) {
      for (int g = 0; g < kScoreGroups; ++g) pack_keys(j + g * kLanes, count, keys_ + g * kLanes);
      products<kScoreRows, kScoreGroups>(first, end, queries_, depth_, keys_, kStep, depth_, scores_ + j, kScoreStride);
    }
  }

  // kLanes keys from `from` on, side by side: `to` [depth][kStep]. Zero for those from `count` on.
  void pack_keys(int from, int count, float* to) const {
    const int64_t units = (a_.head_dim + A::kPer - 1) / A::kPer;
    const T* lines[kLanes];
    for (int i = 0; i < kLanes; ++i)
      lines[i] = from + i < count ? static_cast<const T*>(a_.k_cache) + place_[from + i] : blank_;
    for (int64_t e = 0; e < depth_; e += kLanes) {
      const int take = int(std::clamp<int64_t>(units - e, 0, kLanes));
      Float rows[kLanes];
      if (take == kLanes) {
        for (int i = 0; i < kLanes; ++i) rows[i] = A::unit(lines[i] + e * A::kPer);
      } else {
        for (int i = 0; i < kLanes; ++i) rows[i] = A::unit(lines[i] + e * A::kPer, take);
      }
      // Their values, a little at a time: a CPU waits where many lines are asked for at once.
      for (int i = 0; i < kLanes; ++i) fetch(a_.v_cache, place_[std::min(from + i, count - 1)] + e * A::kPer);
      transpose(rows);
      for (int i = 0; i < kLanes; ++i) store(to + (e + i) * kScoreGroups * kLanes, rows[i]);
    }
  }

  // Whole vectors of keys: those beyond `count` have weight 0 and value 0.
  static int whole_of(int count) { return (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

  // A row's softmax over the keys that it sees; the others up to `count` have weight 0.
  void weigh(int64_t r, int visible, int count, Part to) {
    float* scores = scores_ + r * kScoreStride;
    typename A::Weight* weights = weights_ + r * kWeightStride;
    const int whole = whole_of(count);
    for (int j = visible; j < whole; ++j) scores[j] = kNone;
    const Float scale = all(a_.scale * kLog2E);
    Float tops = all(kNone);
    for (int j = 0; j < whole; j += kLanes) tops = max(tops, load(scores + j) * scale);
    const Float top = all(largest(tops));
    Float total = zero();
    for (int j = 0; j < whole; j += 2 * kLanes) {
      const Float low = exp2(load(scores + j) * scale - top), high = exp2(load(scores + j + kLanes) * scale - top);
      total = total + low + high;
      A::weights(weights + j, low, high);
    }
    to.top[r] = largest(tops);
    to.total[r] = sum(total);
  }

  void value(int64_t first, int64_t end, int count, Part to) {
    pack_values(count);
    const int64_t units = whole_of(count) / A::kPer;
    const Unit* weights = reinterpret_cast<const Unit*>(weights_);
    for (int64_t e = 0; e < width_; e += kValueVectors * kLanes) {
      in_blocks<kValueVectors>(e / kLanes, std::min(e / kLanes + kValueVectors, width_ / kLanes),
                               [&](auto vectors, int64_t at) {
        products<kValueRows, decltype(vectors)::value>(first, end, weights, kWeightStride / A::kPer,
                                                       values_ + at * kLanes, width_, units,
                                                       to.sums + at * kLanes, width_);
      });
    }
  }

  void pack_values(int count) {
    const T* v = static_cast<const T*>(a_.v_cache);
    const int units = (count + A::kPer - 1) / A::kPer;
    for (int u = 0; u < units; ++u) {
      fetch_keys(coming_ / 2 + (u + 1) * (coming_ - coming_ / 2) / units);
      int64_t e = 0;
      if constexpr (A::kPer == 2) {
        const T* second = 2 * u + 1 < count ? v + place_[2 * u + 1] : nullptr;
        for (; e + 2 * kLanes <= a_.head_dim; e += 2 * kLanes)
          A::values(v + place_[2 * u] + e, second ? second + e : nullptr, values_ + u * width_ + e);
      }
      for (; e < width_; e += kLanes) {
        int take = int(std::clamp<int64_t>(a_.head_dim - e, 0, kLanes));
        Float values;
        if constexpr (A::kPer == 2) {
          const T* second = 2 * u + 1 < count ? v + place_[2 * u + 1] + e : nullptr;
          values = A::values(v + place_[2 * u] + e, second, take);
        } else {
          values = A::values(v + place_[u] + e, take);
        }
        store(values_ + u * width_ + e, values);
      }
    }
    std::fill(values_ + units * width_, values_ + whole_of(count) / A::kPer * width_, 0.0f);
  }

  // The products of rows [first, end) of this query tile: `out` begins at row 0, and so do `rows`.
  template <int R, int C>
  void products(int64_t first, int64_t end, const Unit* rows, int64_t row_stride, const float* columns,
                int64_t column_stride, int64_t depth, float* out, int64_t out_stride) {
#ifdef FOLO_AMX
    if constexpr (A::kPer == 2) {
      const auto* left = reinterpret_cast<const uint32_t*>(columns);
      for (int64_t row = first; row < end; row += 2 * amx::kTileRows) {
        const int count = int(std::min<int64_t>(2 * amx::kTileRows, end - row));
        for (int c = 0; c < C; c += 2)
          amx::block_of(registers_, count, rows + row * row_stride, row_stride, left + c * kLanes,
                        c + 1 < C ? left + (c + 1) * kLanes : nullptr, column_stride, depth,
                        out + row * out_stride + c * kLanes, out_stride);
      }
      return;
    }
#endif
    in_blocks<R>(first, end, [&](auto size, int64_t row) {
      row_block<A, decltype(size)::value, C>(rows + row * row_stride, row_stride, columns, column_stride, depth,
                                             out + row * out_stride, out_stride);
    });
  }

  const Attention& a_;
  const int64_t group_, width_, depth_;
  Scratch scratch_;
  Tile tile_{};
  int coming_ = 0, fetched_ = 0;  // keys of the next span
  Unit* queries_ = nullptr;
  float *keys_ = nullptr, *values_ = nullptr;
  T* blank_ = nullptr;  // a row of zeros
  int64_t *position_ = nullptr, *row_place_ = nullptr, *place_ = nullptr, *next_place_ = nullptr;
  float* scores_ = nullptr;
  typename A::Weight* weights_ = nullptr;
  Part own_{}, sum_{};
#ifdef FOLO_AMX
  amx::Registers registers_;
#endif
};

}  // namespace folo::FOLO_ISA
