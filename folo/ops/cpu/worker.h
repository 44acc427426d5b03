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
#include "places.h"
#include "plan.h"
#include "products.h"
#include "scratch.h"
#include "simd.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {

constexpr int kScoreStride = kKeys + 16;        // from row to row: not a power of two, or they share cache lines
constexpr int kWeightStride = kKeys + 32;
constexpr float kLog2E = 1.44269504088896341f;
constexpr int kScoreRows = kLanes == 16 ? 8 : 4;  // of a block, which is scored against two vectors of keys
constexpr int kFewRows = kScoreRows / 2;          // against four: sums enough to keep a core busy
constexpr int kValueRows = kLanes == 16 ? 6 : 3;
constexpr int kValueVectors = 4;                // of the head dimension that a block of rows sums at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

// What a query tile has gathered of the keys so far, or of one tile of them.
struct Part {
  float *top, *total, *sums;  // [rows], [rows], [rows, width]
};

template <typename T>
class Worker {
  using A = Arithmetic<T>;
  using X = typename A::X;
  static constexpr int kPer = A::kPer;

 public:
  explicit Worker(const Attention& a)
      : a_(a),
        group_(a.num_heads / a.num_kv_heads),
        width_(padded(a.head_dim)),
        depth_(kTiles ? padded(a.head_dim / kPer) : a.head_dim / kPer),
        here_(a, depth_),
        next_(a, depth_) {
    take();
    scratch_.allocate();
    take();
    std::fill_n(blank_, width_, 0);
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
        auto* to = reinterpret_cast<Element*>(queries_ + r * depth_);
        for (int64_t i = 0; i < depth_ * kPer; ++i)
          to[i] = i < a_.head_dim ? element(q[row_place_[r] + i]) : Element{};
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
    here_.find(span, tile_.head);
    coming_ = next && next_.keys_direct && next_.values_direct ? int(next->count) : 0;
    if (coming_) next_.find(*next, next_head);
    score(first, span.end, count);
    for (int64_t r = first; r < span.end; ++r)
      weigh(r, int(std::min<int64_t>(kKeys, position_[r] + 1 - start)), count, to);
    value(span, first, to);
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

#ifdef FOLO_AMX
  static constexpr bool kTiles = kPer == 2 && std::is_same_v<X, uint32_t>;  // products are those of AMX
#else
  static constexpr bool kTiles = false;
#endif
  using Element = std::conditional_t<std::is_same_v<X, uint32_t>, bf16, float>;  // of a query row

  static Element element(T x) {
    if constexpr (std::is_same_v<Element, T>) return x;
    else return folo::widen(x);
  }

  void take() {
    queries_ = scratch_.take<X>(kQueries * depth_);
    position_ = scratch_.take<int64_t>(kQueries);
    row_place_ = scratch_.take<int64_t>(kQueries);
    blank_ = scratch_.take<uint32_t>(width_);
    if (kTiles) values_ = scratch_.take<uint32_t>(kKeys / kPer * width_);
    here_.take(scratch_);
    scores_ = scratch_.take<float>(kQueries * kScoreStride);
    weights_ = scratch_.take<Element>(kQueries * kWeightStride);
    own_ = part_at(scratch_.take<float>(floats_of_part()));
    sum_ = part_at(scratch_.take<float>(floats_of_part()));
  }

  // Scores of rows [first, end) with keys 0 to `count`; those of others in the same vectors are anything.
  void score(int64_t first, int64_t end, int count) {
    if (kTiles || end - first > kFewRows) {
      score_by<kScoreRows, 2>(first, end, count);
    } else {
      score_by<kFewRows, 4>(first, end, count);
    }
  }

  template <int R, int C>
  void score_by(int64_t first, int64_t end, int count) {
    const int64_t stride = here_.key_stride;
    const int groups = (count + kGroup - 1) / kGroup, coming = (coming_ + kGroup - 1) / kGroup;
    for (int j = 0; j < count; j += C * kLanes) {
      const uint32_t *columns[C], *ahead[C];
      for (int c = 0; c < C; ++c) {
        const int key = j + c * kLanes, group = std::min(key / kGroup, groups - 1);
        columns[c] = here_.keys[group] + key % kGroup;
        ahead[c] = coming ? next_.keys[std::min(group, coming - 1)] : columns[c];
      }
      if constexpr (kTiles) {
        tiles(first, end, queries_, depth_, columns[0], columns[1], stride, depth_, scores_ + j, kScoreStride,
              [&](int64_t row, int64_t u) __attribute__((always_inline)) {
          for (int64_t i = u; row == first && i < u + kGroup; ++i)
            for (int c = 0; c < C; ++c) fetch(ahead[c] + i * stride);
        });
      } else {
        products<R, C>(first, end, queries_, depth_, depth_, scores_ + j, kScoreStride,
                       [&](int64_t row, int64_t u, int c) {
          fetch((row == first ? ahead[c] : columns[c]) + u * stride);
          return columns[c] + u * stride;
        });
      }
    }
    for (int g = groups; g < coming; ++g)
      for (int64_t u = 0; u < depth_; ++u) fetch(next_.keys[g] + u * stride);
  }

  // What the next span is to find in cache. Each line is asked for where there is work in the meantime, one for each
  // vector that is multiplied: a CPU waits where many are asked for at once.
  static void fetch(const uint32_t* line) { _mm_prefetch(line, _MM_HINT_T1); }

  // Whole vectors of keys: those beyond `count` have weight 0 and value 0.
  static int whole_of(int count) { return (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes); }

  // A row's softmax over the keys that it sees; the others up to `count` have weight 0.
  void weigh(int64_t r, int visible, int count, Part to) {
    float* scores = scores_ + r * kScoreStride;
    Element* weights = weights_ + r * kWeightStride;
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
      store_pair(weights + j, low, high);
    }
    to.top[r] = largest(tops);
    to.total[r] = sum(total);
  }

  void value(const Span& span, int64_t first, Part to) {
    const int count = int(span.count), units = (count + kPer - 1) / kPer, coming = (coming_ + kPer - 1) / kPer;
    here_.end_values(count);
    const X* weights = reinterpret_cast<const X*>(weights_);
    constexpr int64_t kStride = kWeightStride / kPer;
    if constexpr (kTiles) {
      const int whole = int(padded(units));
      for (int u = 0; u < whole; ++u) {
        std::memcpy(values_ + u * width_, u < units ? here_.values[u] : blank_, size_t(width_) * 4);
        for (int64_t i = 0; u < coming && i < width_; i += kGroup) fetch(next_.values[u] + i);
      }
      for (int64_t e = 0; e < width_; e += 2 * kGroup)
        tiles(first, span.end, weights, kStride, values_ + e, e + kGroup < width_ ? values_ + e + kGroup : nullptr,
              width_, whole, to.sums + e, width_, [](int64_t, int64_t) {});
    } else {
      for (int64_t e = 0; e < width_; e += kValueVectors * kLanes) {
        in_blocks<kValueVectors>(e / kLanes, std::min(e / kLanes + kValueVectors, width_ / kLanes),
                                 [&](auto vectors, int64_t at) {
          products<kValueRows, decltype(vectors)::value>(first, span.end, weights, kStride, units,
                                                         to.sums + at * kLanes, width_,
                                                         [&](int64_t row, int64_t u, int c) {
            const uint32_t* from = here_.values[u];
            fetch((row == first && coming ? next_.values[std::min(int(u), coming - 1)] : from) + (at + c) * kLanes);
            return from + (at + c) * kLanes;
          });
        });
      }
    }
    for (int u = units; u < coming; ++u)
      for (int64_t i = 0; i < width_; i += kGroup) fetch(next_.values[u] + i);
  }

  // The products of rows [first, end) of this query tile: `out` begins at row 0, and so do `rows`.
  template <int R, int C, typename Columns>
  static void products(int64_t first, int64_t end, const X* rows, int64_t row_stride, int64_t depth, float* out,
                       int64_t out_stride, Columns columns) {
    in_blocks<R>(first, end, [&](auto size, int64_t row) {
      row_block<A, decltype(size)::value, C>(rows + row * row_stride, row_stride, depth, out + row * out_stride,
                                             out_stride, [&](int64_t u, int c) { return columns(row, u, c); });
    });
  }

#ifdef FOLO_AMX
  // The same in tiles; `meanwhile`(row, unit): see amx.h.
  template <typename F>
  void tiles(int64_t first, int64_t end, const uint32_t* rows, int64_t row_stride, const uint32_t* left,
             const uint32_t* right, int64_t column_stride, int64_t depth, float* out, int64_t out_stride,
             F&& meanwhile) {
    amx::in_even_blocks(first, end, [&](int64_t row, int count, int64_t) {
      amx::block_of(registers_, count, rows + row * row_stride, row_stride, left, right, column_stride, depth, false,
                    out + row * out_stride, out_stride,
                    [&](int64_t u) __attribute__((always_inline)) { meanwhile(row, u); });
    });
  }
  amx::Registers registers_;
#endif

  const Attention& a_;
  const int64_t group_, width_, depth_;  // of the head dimension: in whole vectors; in units
  Scratch scratch_;
  Tile tile_{};
  Places<kPer> here_, next_;
  int coming_ = 0;  // keys of the next span
  X* queries_ = nullptr;
  uint32_t *values_ = nullptr, *blank_ = nullptr;  // rows of V, side by side for tiles; one of zeros
  int64_t *position_ = nullptr, *row_place_ = nullptr;
  float* scores_ = nullptr;
  Element* weights_ = nullptr;
  Part own_{}, sum_{};
};

}  // namespace folo::FOLO_ISA
