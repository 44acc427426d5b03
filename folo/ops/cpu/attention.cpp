// Causal attention over paged K and V, which are read where they lie.
//
// Keys go in tiles of kKeys from position 0 upward, whatever the block size. Each tile gives a row its own
// maximum, sum and weighted values (softmax within the tile); tiles are then merged in order, as in Milakov &
// Gimelshein 2018. A tile's part depends on nothing before it, so the tiles of one long context can be shared
// out among threads without changing a bit. Within a tile, scores sum over the head dimension in order, and
// values over the keys in order; a key that a row does not see has weight 0, which adds nothing.
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

namespace folo::FOLO_ISA {
namespace {

constexpr int kKeys = 256;                      // of a tile
constexpr int kQueries = 48;                    // rows of a query tile: tokens times heads of a group
constexpr int kScoreGroups = 2;                 // vectors of keys that a block of rows is scored against
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
  int64_t num_tiles;  // of keys, up to the last row's position
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
  }

  Part part() { return own_; }

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
  }

  // The part of keys [number * kKeys, ...) alone; returns the first row that sees any of them.
  int64_t tile(int64_t number, Part to) {
    const int64_t start = number * kKeys, last = position_[tile_.rows - 1];
    const int count = int(std::min<int64_t>(kKeys, last + 1 - start));
    const int64_t first = std::lower_bound(position_, position_ + tile_.rows, start) - position_;
    // Some of the next tile's too: to be fetched in time.
    locate(start, int(std::min<int64_t>(kKeys + kScoreGroups * kLanes, last + 1 - start)));
    score(first, count);
    for (int64_t r = first; r < tile_.rows; ++r) weigh(r, int(position_[r] + 1 - start), count, to);
    value(first, count, to);
    return first;
  }

  // `next`, from row `first` on, added to what `sum` has gathered of the keys before.
  void merge(Part sum, Part next, int64_t first, bool is_first) {
    for (int64_t r = first; r < tile_.rows; ++r) {
      float before = is_first ? kNone : sum.top[r], top = std::max(before, next.top[r]);
      float old_scale = is_first ? 0.0f : one_exp(before - top), new_scale = one_exp(next.top[r] - top);
      sum.top[r] = top;
      sum.total[r] = (is_first ? 0.0f : sum.total[r] * old_scale) + next.total[r] * new_scale;
      float *to = sum.sums + r * width_, *from = next.sums + r * width_;
      for (int64_t i = 0; i < width_; i += kLanes) {
        Float grown = load(from + i) * all(new_scale);
        store(to + i, is_first ? grown : load(to + i) * all(old_scale) + grown);
      }
    }
  }

  void finish(Part sum) {
    T* out = static_cast<T*>(a_.out);
    for (int64_t r = 0; r < tile_.rows; ++r) {
      int64_t row = tile_.first + r;
      T* to = out + (begin(tile_) + row / group_) * a_.num_heads * a_.head_dim +
              (tile_.head * group_ + row % group_) * a_.head_dim;
      for (int64_t i = 0; i < a_.head_dim; i += kLanes) {
        Float value = load(sum.sums + r * width_ + i) / all(sum.total[r]);
        int64_t left = a_.head_dim - i;
        if (left >= kLanes) {
          store(to + i, value);
        } else {
          store(to + i, value, int(left));
        }
      }
    }
  }

  int64_t floats_of_part() const { return kQueries * (width_ + 2); }
  Part part_at(float* memory) const { return {memory, memory + kQueries, memory + 2 * kQueries}; }

 private:
  void take() {
    queries_ = scratch_.take<Unit>(kQueries * depth_);
    position_ = scratch_.take<int64_t>(kQueries);
    place_ = scratch_.take<int64_t>(kKeys + kScoreGroups * kLanes);
    keys_ = scratch_.take<Unit>(depth_ * kScoreGroups * kLanes);
    scores_ = scratch_.take<float>(kQueries * kKeys);
    weights_ = scratch_.take<typename A::Weight>(kQueries * A::kParts * kKeys);
    values_ = scratch_.take<Unit>(kKeys / A::kPer * width_);
    own_ = part_at(scratch_.take<float>(floats_of_part()));
  }

  int64_t begin(const Tile& t) const { return a_.query_start[t.sequence]; }
  int64_t end(const Tile& t) const { return a_.query_start[t.sequence + 1]; }

  // Where the keys of a tile lie, in elements from the start of the caches.
  void locate(int64_t start, int count) {
    located_ = count;
    const int32_t* table = a_.block_tables + tile_.sequence * a_.table_width;
    for (int j = 0; j < count; ++j) {
      int64_t key = start + j, slot = int64_t(table[key / a_.block_size]) * a_.block_size + key % a_.block_size;
      place_[j] = (slot * a_.num_kv_heads + tile_.head) * a_.head_dim;
    }
  }

  void prefetch(const void* cache, int from, int to) const {
    const char* bytes = static_cast<const char*>(cache);
    const int64_t row = a_.head_dim * int64_t(sizeof(T));
    for (int j = from; j < to; ++j)
      for (int64_t at = 0; at < row; at += 64)
        _mm_prefetch(bytes + place_[j] * int64_t(sizeof(T)) + at, _MM_HINT_T1);
  }

  // Scores of the rows from `first` on with keys 0 to `count`, which take their places in lanes.
  void score(int64_t first, int count) {
    const T* k = static_cast<const T*>(a_.k_cache);
    const int64_t units = (a_.head_dim + A::kPer - 1) / A::kPer;
    constexpr int kStep = kScoreGroups * kLanes;
    for (int j = 0; j < count; j += kStep) {
      // Rows of one head lie apart: no prefetcher of the CPU follows them.
      prefetch(a_.v_cache, j, std::min(count, j + kStep));
      prefetch(a_.k_cache, j + kStep, std::min(located_, j + 2 * kStep));
      for (int g = 0; g < kScoreGroups; ++g) {
        for (int64_t e = 0; e < units; e += kLanes) {
          Float rows[kLanes];
          int take = int(std::min<int64_t>(kLanes, units - e));
          for (int i = 0; i < kLanes; ++i) {
            int key = j + g * kLanes + i;
            rows[i] = key < count ? A::unit(k + place_[key] + e * A::kPer, take) : zero();
          }
          transpose(rows);
          for (int i = 0; i < take; ++i)
            store(reinterpret_cast<float*>(keys_) + (e + i) * kStep + g * kLanes, rows[i]);
        }
      }
      in_blocks<kScoreRows>(first, tile_.rows, [&](auto size, int64_t row) {
        constexpr int R = decltype(size)::value;
        const Unit* q = queries_ + row * depth_;
        const float* keys = reinterpret_cast<const float*>(keys_);
        Float sums[R][kScoreGroups];
        for (auto& sum : sums)
          for (auto& s : sum) s = zero();
        for (int64_t e = 0; e < units; ++e) {
          for (int g = 0; g < kScoreGroups; ++g) {
            Float many = load(keys + e * kStep + g * kLanes);
            for (int r = 0; r < R; ++r) sums[r][g] = A::step(sums[r][g], many, q[r * depth_ + e]);
          }
        }
        for (int r = 0; r < R; ++r)
          for (int g = 0; g < kScoreGroups; ++g)
            store(scores_ + (row + r) * kKeys + j + g * kLanes, sums[r][g] * all(a_.scale));
      });
    }
  }

  // A row's softmax over the keys that it sees; the others up to `count` have weight 0.
  void weigh(int64_t r, int visible, int count, Part to) {
    float* scores = scores_ + r * kKeys;
    typename A::Weight* weights = weights_ + r * A::kParts * kKeys;
    visible = std::min(visible, count);
    const int whole = (count + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
    for (int j = visible; j < whole; ++j) scores[j] = kNone;
    Float tops = all(kNone);
    for (int j = 0; j < whole; j += kLanes) tops = max(tops, load(scores + j));
    const float top = largest(tops);
    Float total = zero();
    for (int j = 0; j < whole; j += kLanes) {
      Float weight = exp(load(scores + j) - all(top));
      total = total + weight;
      store(weights + j, weight);
      if constexpr (A::kParts == 2) store(weights + kKeys + j, weight - load(weights + j));
    }
    to.top[r] = top;
    to.total[r] = sum(total);
  }

  void value(int64_t first, int count, Part to) {
    const T* v = static_cast<const T*>(a_.v_cache);
    const int units = (count + A::kPer - 1) / A::kPer;
    for (int u = 0; u < units; ++u) {
      int64_t e = 0;
      if constexpr (A::kPer == 2) {
        const T* second = 2 * u + 1 < count ? v + place_[2 * u + 1] : nullptr;
        for (; e + 2 * kLanes <= a_.head_dim; e += 2 * kLanes)
          A::values(v + place_[2 * u] + e, second ? second + e : nullptr,
                    reinterpret_cast<float*>(values_) + u * width_ + e);
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
        store(reinterpret_cast<float*>(values_) + u * width_ + e, values);
      }
    }
    const float* values = reinterpret_cast<const float*>(values_);
    for (int64_t e = 0; e < width_; e += kValueVectors * kLanes) {
      in_blocks<kValueVectors>(e / kLanes, std::min(e / kLanes + kValueVectors, width_ / kLanes),
                               [&](auto vectors, int64_t at) {
        in_blocks<kValueRows>(first, tile_.rows, [&](auto size, int64_t row) {
          constexpr int R = decltype(size)::value, V = decltype(vectors)::value;
          constexpr int kUnits = kKeys / A::kPer;  // of a row's weights, or of a part of them
          const Unit* weights = reinterpret_cast<const Unit*>(weights_ + row * A::kParts * kKeys);
          Float sums[R][V];
          for (auto& sum : sums)
            for (auto& s : sum) s = zero();
          for (int u = 0; u < units; ++u) {
            for (int i = 0; i < V; ++i) {
              Float many = load(values + u * width_ + (at + i) * kLanes);
              for (int r = 0; r < R; ++r)
                for (int part = 0; part < A::kParts; ++part)
                  sums[r][i] = A::step(sums[r][i], many, weights[(r * A::kParts + part) * kUnits + u]);
            }
          }
          for (int r = 0; r < R; ++r)
            for (int i = 0; i < V; ++i) store(to.sums + (row + r) * width_ + (at + i) * kLanes, sums[r][i]);
        });
      });
    }
  }

  static float one_exp(float x) {
    alignas(64) float lanes[kLanes];
    store(lanes, exp(all(x)));
    return lanes[0];
  }

  const Attention& a_;
  const int64_t group_, width_, depth_;
  Scratch scratch_;
  Tile tile_{};
  int located_ = 0;
  Unit *queries_ = nullptr, *keys_ = nullptr, *values_ = nullptr;
  int64_t *position_ = nullptr, *place_ = nullptr;
  float* scores_ = nullptr;
  typename A::Weight* weights_ = nullptr;
  Part own_{};
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
        tiles.push_back({s, h, first, count, (length + kKeys - 1) / kKeys});
    }
  }
  // Those that take longest first, so that no thread is left with one at the end.
  std::stable_sort(tiles.begin(), tiles.end(), [](const Tile& x, const Tile& y) {
    return x.num_tiles * (x.rows + 8) > y.num_tiles * (y.rows + 8);
  });
  return tiles;
}

template <typename T>
void attention_of(const Attention& a) {
  const std::vector<Tile> tiles = tiles_of(a);
  const int64_t count = int64_t(tiles.size()), threads = omp_get_max_threads();
  if (!count) return;
  if (threads == 1 || count >= 4 * threads || tiles[0].num_tiles == 1) {
#pragma omp parallel
    {
      Worker<T> worker(a);
      std::vector<float> memory(size_t(worker.floats_of_part()));
      Part sum = worker.part_at(memory.data());
#pragma omp for schedule(dynamic)
      for (int64_t n = 0; n < count; ++n) {
        worker.start(tiles[size_t(n)]);
        for (int64_t k = 0; k < tiles[size_t(n)].num_tiles; ++k) {
          int64_t first = worker.tile(k, worker.part());
          worker.merge(sum, worker.part(), first, k == 0);
        }
        worker.finish(sum);
      }
    }
    return;
  }
  // Few, and long: each tile of keys is work of its own, and the parts are merged afterwards.
  std::vector<std::pair<int64_t, int64_t>> units;
  for (int64_t n = 0; n < count; ++n)
    for (int64_t k = 0; k < tiles[size_t(n)].num_tiles; ++k) units.push_back({n, k});
  std::vector<int64_t> offset(size_t(count) + 1, 0);
  for (int64_t n = 0; n < count; ++n) offset[size_t(n) + 1] = offset[size_t(n)] + tiles[size_t(n)].num_tiles;
  std::vector<int64_t> first(units.size());
  const int64_t size = Worker<T>(a).floats_of_part();
  std::unique_ptr<float[]> parts(new float[units.size() * size_t(size)]);
#pragma omp parallel
  {
    Worker<T> worker(a);
#pragma omp for schedule(dynamic)
    for (int64_t u = 0; u < int64_t(units.size()); ++u) {
      auto [n, k] = units[size_t(u)];
      worker.start(tiles[size_t(n)]);
      first[size_t(u)] = worker.tile(k, worker.part_at(parts.get() + u * size));
    }
    std::vector<float> memory(static_cast<size_t>(size));
    Part sum = worker.part_at(memory.data());
#pragma omp for schedule(dynamic)
    for (int64_t n = 0; n < count; ++n) {
      worker.start(tiles[size_t(n)]);
      for (int64_t u = offset[size_t(n)]; u < offset[size_t(n) + 1]; ++u)
        worker.merge(sum, worker.part_at(parts.get() + u * size), first[size_t(u)], u == offset[size_t(n)]);
      worker.finish(sum);
    }
  }
}

}  // namespace

void attention(const Attention& a) { FOLO_BY_DTYPE(a.dtype, attention_of, a); }

}  // namespace folo::FOLO_ISA
