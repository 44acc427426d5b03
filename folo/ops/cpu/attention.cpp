// Causal attention over paged K and V, which are read where they lie.
//
// Keys go in tiles of kKeys from position 0 upward, whatever the block size. Each tile gives a row its own
// maximum, sum and weighted values (softmax within the tile); tiles are then merged in order, as in Milakov &
// Gimelshein 2018. A tile's part depends on nothing before it, so the tiles of one long context can be shared
// out among threads without changing a bit. Within a tile, scores sum over the head dimension in order, and
// values over the keys in order; a key that a row does not see has weight 0, which adds nothing. Weights are
// powers of two of scores times log2(e), in float32; bfloat16 products round them, as in flash attention.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "blocks.h"
#include "kernels.h"
#include "products.h"
#include "rows.h"
#include "scratch.h"
#include "simd.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {
namespace {

constexpr int kKeys = 256;                      // of a tile
constexpr int kQueries = 96;                    // rows of a query tile: tokens times heads of a group
constexpr int kScoreGroups = 2;                 // vectors of keys that a block of rows is scored against
constexpr int kScoreStride = kKeys + 16;        // from row to row: not a power of two, or they share cache lines
constexpr int kWeightStride = kKeys + 32;
constexpr float kLog2E = 1.44269504088896341f;
constexpr int kScoreRows = kLanes == 16 ? 8 : 4;
constexpr int kValueRows = kLanes == 16 ? 6 : 3;
constexpr int kValueVectors = 4;                // of the head dimension that a block of rows sums at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t padded(int64_t x) { return (x + 15) / 16 * 16; }

// What a query tile has gathered of the keys so far, or of one tile of them.
struct Part {
  float *top, *total, *sums;  // [rows], [rows], [rows, width]
};

// Some query rows of one KV head of one sequence.
struct Tile {
  int64_t sequence, head, first, rows;
  int64_t length;  // keys up to the last row's position
  int64_t num_tiles() const { return (length + kKeys - 1) / kKeys; }
};

// A tile of keys that a query tile is to see.
struct Step {
  const Tile* tile;
  int64_t number;
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

  void start(const Tile& t) {
    tile_ = t;
    const T* q = static_cast<const T*>(a_.q);
    for (int64_t r = 0; r < t.rows; ++r) {
      int64_t row = t.first + r;
      const T* from = q + (begin(t) + row / group_) * a_.num_heads * a_.head_dim +
                      (t.head * group_ + row % group_) * a_.head_dim;
      Unit* to = queries_ + r * depth_;
      for (int64_t i = 0; i < depth_; ++i) to[i] = 0;
      if constexpr (A::kPer == 2) {
        std::memcpy(to, from, size_t(a_.head_dim) * sizeof(T));
      } else {
        for (int64_t i = 0; i < a_.head_dim; ++i) to[i] = folo::widen(from[i]);
      }
      position_[r] = a_.seq_lens[t.sequence] - (end(t) - begin(t)) + row / group_;
    }
    std::fill_n(sum_.top, t.rows, kNone);
    std::fill_n(sum_.total, t.rows, 0.0f);
    std::fill_n(sum_.sums, t.rows * width_, 0.0f);
  }

  // The part of keys [number * kKeys, ...) alone; returns the first row that sees any of them. `next`: what
  // comes after it, if anything does: to be fetched in time.
  int64_t tile(int64_t number, Step next, Part to) {
    const int64_t start = number * kKeys;
    const int64_t first = std::lower_bound(position_, position_ + tile_.rows, start) - position_;
    const int count = locate({&tile_, number}, place_);
    coming_ = next.tile ? locate(next, next_place_) : 0;
    score(first, count);
    for (int64_t r = first; r < tile_.rows; ++r) weigh(r, int(position_[r] + 1 - start), count, to);
    value(first, count, to);
    return first;
  }

  // `next`, from row `first` on, added to what the tiles of keys before it came to.
  void merge(Part next, int64_t first) {
    alignas(64) float old_scale[kLanes], new_scale[kLanes];
    for (int64_t at = first; at < tile_.rows; at += kLanes) {
      const Float before = load(sum_.top + at), own = load(next.top + at), top = max(before, own);
      const Float shrunk = exp2(before - top), added = exp2(own - top);
      store(old_scale, shrunk);
      store(new_scale, added);
      store(sum_.top + at, top);
      store(sum_.total + at, load(sum_.total + at) * shrunk + load(next.total + at) * added);
      for (int64_t r = at; r < std::min(tile_.rows, at + kLanes); ++r) {
        float *to = sum_.sums + r * width_, *from = next.sums + r * width_;
        const Float kept = all(old_scale[r - at]), taken = all(new_scale[r - at]);
        for (int64_t i = 0; i < width_; i += kLanes) store(to + i, load(to + i) * kept + load(from + i) * taken);
      }
    }
  }

  void finish() const {
    T* out = static_cast<T*>(a_.out);
    for (int64_t r = 0; r < tile_.rows; ++r) {
      int64_t row = tile_.first + r;
      T* to = out + (begin(tile_) + row / group_) * a_.num_heads * a_.head_dim +
              (tile_.head * group_ + row % group_) * a_.head_dim;
      for (int64_t i = 0; i < a_.head_dim; i += kLanes) {
        Float value = load(sum_.sums + r * width_ + i) / all(sum_.total[r]);
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

  int64_t begin(const Tile& t) const { return a_.query_start[t.sequence]; }
  int64_t end(const Tile& t) const { return a_.query_start[t.sequence + 1]; }

  // Where the keys of a tile lie, in elements from the start of the caches, and how many they are.
  int locate(Step step, int64_t* place_of) const {
    const int64_t start = step.number * kKeys;
    const int count = int(std::min<int64_t>(kKeys, step.tile->length - start));
    const int32_t* table = a_.block_tables + step.tile->sequence * a_.table_width + start / a_.block_size;
    const auto& strides = a_.strides;
    int64_t offset = start % a_.block_size;
    for (int j = 0; j < count; offset = 0, ++table) {
      int64_t place = *table * strides.block + offset * strides.slot + step.tile->head * strides.head;
      for (int end = int(std::min<int64_t>(count, j + a_.block_size - offset)); j < end; ++j, place += strides.slot)
        place_of[j] = place;
    }
    return count;
  }

  static constexpr int64_t kLine = 64 / int64_t(sizeof(T));  // of a cache, in elements

  // A line of K or V to come. Heads lie apart: no prefetcher of the CPU follows them far.
  static void fetch(const void* cache, int64_t at) {
    _mm_prefetch(static_cast<const char*>(cache) + at * int64_t(sizeof(T)), _MM_HINT_T1);
  }

  // Scores of the rows from `first` on with keys 0 to `count`, which take their places in lanes.
  void score(int64_t first, int count) {
    constexpr int kStep = kScoreGroups * kLanes;
    for (int j = 0; j < count; j += kStep) {
      for (int g = 0; g < kScoreGroups; ++g) pack_keys(j + g * kLanes, count, keys_ + g * kLanes);
      products<kScoreRows, kScoreGroups>(first, queries_, depth_, keys_, kStep, depth_, scores_ + j, kScoreStride);
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

  // A row's softmax over the keys that it sees; the others up to `count` have weight 0.
  void weigh(int64_t r, int visible, int count, Part to) {
    float* scores = scores_ + r * kScoreStride;
    typename A::Weight* weights = weights_ + r * kWeightStride;
    visible = std::min(visible, count);
    const int whole = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
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

  void value(int64_t first, int count, Part to) {
    pack_values(count);
    // Whole vectors of keys: those beyond `count` have weight 0 and value 0.
    const int64_t units = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes) / A::kPer;
    const Unit* weights = reinterpret_cast<const Unit*>(weights_);
    for (int64_t e = 0; e < width_; e += kValueVectors * kLanes) {
      in_blocks<kValueVectors>(e / kLanes, std::min(e / kLanes + kValueVectors, width_ / kLanes),
                               [&](auto vectors, int64_t at) {
        products<kValueRows, decltype(vectors)::value>(first, weights, kWeightStride / A::kPer,
                                                       values_ + at * kLanes, width_, units,
                                                       to.sums + at * kLanes, width_);
      });
    }
  }

  void pack_values(int count) {
    const T* v = static_cast<const T*>(a_.v_cache);
    const int units = (count + A::kPer - 1) / A::kPer;
    for (int u = 0; u < units; ++u) {
      for (int j = u * A::kPer; j < std::min(coming_, (u + 1) * A::kPer); ++j)
        for (int64_t e = 0; e < a_.head_dim; e += kLine) fetch(a_.k_cache, next_place_[j] + e);
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
    const int64_t whole = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes) / A::kPer;
    std::fill(values_ + units * width_, values_ + whole * width_, 0.0f);
  }

  // The products of this query tile's rows from `first` on: `out` begins at row 0, and so do `rows`.
  template <int R, int C>
  void products(int64_t first, const Unit* rows, int64_t row_stride, const float* columns, int64_t column_stride,
                int64_t depth, float* out, int64_t out_stride) {
#ifdef FOLO_AMX
    if constexpr (A::kPer == 2) {
      const auto* left = reinterpret_cast<const uint32_t*>(columns);
      for (int64_t row = first; row < tile_.rows; row += 2 * amx::kTileRows) {
        const int count = int(std::min<int64_t>(2 * amx::kTileRows, tile_.rows - row));
        for (int c = 0; c < C; c += 2)
          amx::block_of(registers_, count, rows + row * row_stride, row_stride, left + c * kLanes,
                        c + 1 < C ? left + (c + 1) * kLanes : nullptr, column_stride, depth,
                        out + row * out_stride + c * kLanes, out_stride);
      }
      return;
    }
#endif
    in_blocks<R>(first, tile_.rows, [&](auto size, int64_t row) {
      row_block<A, decltype(size)::value, C>(rows + row * row_stride, row_stride, columns, column_stride, depth,
                                             out + row * out_stride, out_stride);
    });
  }

  const Attention& a_;
  const int64_t group_, width_, depth_;
  Scratch scratch_;
  Tile tile_{};
  int coming_ = 0;
  Unit* queries_ = nullptr;
  float *keys_ = nullptr, *values_ = nullptr;
  T* blank_ = nullptr;  // a row of zeros
  int64_t *position_ = nullptr, *place_ = nullptr, *next_place_ = nullptr;
  float* scores_ = nullptr;
  typename A::Weight* weights_ = nullptr;
  Part own_{}, sum_{};
#ifdef FOLO_AMX
  amx::Registers registers_;
#endif
};

std::vector<Tile> tiles_of(const Attention& a) {
  std::vector<Tile> tiles;
  const int64_t group = a.num_heads / a.num_kv_heads;
  for (int64_t s = 0; s < a.num_sequences; ++s) {
    const int64_t tokens = a.query_start[s + 1] - a.query_start[s], rows = tokens * group;
    for (int64_t first = 0; first < rows; first += kQueries) {
      const int64_t count = std::min<int64_t>(kQueries, rows - first);
      const int64_t length = a.seq_lens[s] - tokens + (first + count - 1) / group + 1;
      for (int64_t h = 0; h < a.num_kv_heads; ++h)
        tiles.push_back({s, h, first, count, length});
    }
  }
  // Those that take longest first, so that no thread is left with one at the end.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) {
    return x.num_tiles() * (x.rows + 8) > y.num_tiles() * (y.rows + 8);
  });
  return tiles;
}

template <typename T>
void attention_of(const Attention& a) {
  const std::vector<Tile> tiles = tiles_of(a);
  const int64_t count = int64_t(tiles.size()), threads = omp_get_max_threads();
  if (!count) return;
  if (threads == 1 || count >= 4 * threads || tiles[0].num_tiles() == 1) {
    // Neighbours to one thread, which fetches the second while it works on the first.
    const int64_t chunk = std::clamp<int64_t>(count / (16 * threads), 1, 8);
#pragma omp parallel
    {
      Worker<T> worker(a);
#pragma omp for schedule(dynamic, chunk)
      for (int64_t n = 0; n < count; ++n) {
        const Tile& tile = tiles[size_t(n)];
        worker.start(tile);
        for (int64_t k = 0; k < tile.num_tiles(); ++k) {
          const Step after = n + 1 < count ? Step{&tile + 1, 0} : Step{};
          const int64_t first = worker.tile(k, k + 1 < tile.num_tiles() ? Step{&tile, k + 1} : after, worker.own());
          worker.merge(worker.own(), first);
        }
        worker.finish();
      }
    }
    return;
  }
  // Few, and long: each tile of keys is work of its own, and the parts are merged afterwards.
  std::vector<Step> units;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t k = 0; k < tiles[size_t(n)].num_tiles(); ++k) units.push_back({&tiles[size_t(n)], k});
  std::vector<int64_t> offset(size_t(count) + 1, 0);
  for (int64_t n = 0; n < count; ++n) offset[size_t(n) + 1] = offset[size_t(n)] + tiles[size_t(n)].num_tiles();
  std::vector<int64_t> first(units.size());
  const int64_t size = Worker<T>(a).floats_of_part();
  std::unique_ptr<float[]> parts(new float[units.size() * size_t(size)]);
#pragma omp parallel
  {
    Worker<T> worker(a);
#pragma omp for schedule(static)
    for (int64_t u = 0; u < int64_t(units.size()); ++u) {
      const Step step = units[size_t(u)], after = u + 1 < int64_t(units.size()) ? units[size_t(u) + 1] : Step{};
      worker.start(*step.tile);
      first[size_t(u)] = worker.tile(step.number, after, worker.part_at(parts.get() + u * size));
    }
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < count; ++n) {
      worker.start(tiles[size_t(n)]);
      for (int64_t u = offset[size_t(n)]; u < offset[size_t(n) + 1]; ++u)
        worker.merge(worker.part_at(parts.get() + u * size), first[size_t(u)]);
      worker.finish();
    }
  }
}

}  // namespace

void attention(const Attention& a) { FOLO_BY_DTYPE(a.dtype, attention_of, a); }

}  // namespace folo::FOLO_ISA
