// What attention has to do, cut into pieces: query tiles, and the tiles of keys that each of them is to see.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "simd.h"

namespace folo::FOLO_ISA {

constexpr int kKeys = 256;    // of a tile
constexpr int kQueries = 96;  // rows of a query tile: tokens times heads of a group

// Rows of a query tile that are of one sequence: `first` of its rows, counted by tokens and heads of a group.
struct Member {
  int64_t sequence, first, rows;
};

// Some query rows of one KV head: of one sequence, or of several whose first keys are the same blocks.
struct Tile {
  int64_t head, rows;
  const Member* members;
  int64_t num_members;
  int64_t first_span, end_span;
};

// Tiles [begin, end): a thread's share of the work.
struct Share {
  int64_t begin, end;
};

// Keys [number * kKeys, ...) of a sequence, to be seen by rows [begin, end) of a query tile.
struct Span {
  int64_t tile, sequence, number, begin, end;
  int64_t count;  // of keys, up to the last row's position
};

class Plan {
 public:
  Plan(const Attention& a, int64_t threads) : a_(a), group_(a.num_heads / a.num_kv_heads) {
    std::vector<std::vector<Member>> bundles;
    std::vector<Member> few;  // sequences of a few rows: they may share their first tiles of keys
    for (int64_t s = 0; s < a.num_sequences; ++s) {
      const int64_t rows = (a.query_start[s + 1] - a.query_start[s]) * group_;
      if (rows > 0 && rows * 2 <= kQueries) {
        few.push_back({s, 0, rows});
      } else {
        for (int64_t first = 0; first < rows; first += kQueries)
          bundles.push_back({{s, first, std::min<int64_t>(kQueries, rows - first)}});
      }
    }
    const int64_t rows = bundle_rows(few, threads);
    for (const Member& member : few) {
      const bool fits = !bundles.empty() && bundles.back()[0].rows * 2 <= kQueries &&
                        rows_of(bundles.back()) + member.rows <= rows && shared_tiles(bundles.back()[0], member) > 0;
      if (!fits) bundles.emplace_back();
      bundles.back().push_back(member);
    }
    deal(bundles, threads);
  }

  std::vector<Tile> tiles;
  std::vector<Share> shares;  // of each thread
  std::vector<Span> spans;  // a tile's spans stand together, those of each row in the order of the keys

 private:
  // Those that take longest first, each to the thread that has least to do.
  void deal(std::vector<std::vector<Member>>& bundles, int64_t threads) {
    std::stable_sort(bundles.begin(), bundles.end(), [&](const auto& x, const auto& y) { return cost(x) > cost(y); });
    size_t num_members = 0;
    for (const auto& bundle : bundles) num_members += bundle.size();
    members_.reserve(num_members);
    struct Work {
      const Member* members;
      int64_t count, rows, shared, head;
    };
    std::vector<std::vector<Work>> of_thread(static_cast<size_t>(threads));
    std::vector<double> load(static_cast<size_t>(threads));
    for (const auto& bundle : bundles) {
      const Member* at = members_.data() + members_.size();
      members_.insert(members_.end(), bundle.begin(), bundle.end());
      int64_t shared = bundle.size() > 1 ? shared_tiles(bundle[0], bundle[1]) : 0;
      for (size_t m = 2; m < bundle.size(); ++m) shared = std::min(shared, shared_tiles(bundle[0], bundle[m]));
      for (int64_t h = 0; h < a_.num_kv_heads; ++h) {
        const auto least = std::min_element(load.begin(), load.end());
        *least += cost(bundle);
        of_thread[size_t(least - load.begin())].push_back({at, int64_t(bundle.size()), rows_of(bundle), shared, h});
      }
    }
    for (const auto& works : of_thread) {
      const int64_t begin = int64_t(tiles.size());
      for (const Work& work : works) add(work.head, work.members, work.count, work.rows, work.shared);
      shares.push_back({begin, int64_t(tiles.size())});
    }
  }

  static int64_t rows_of(const std::vector<Member>& bundle) {
    int64_t rows = 0;
    for (const Member& member : bundle) rows += member.rows;
    return rows;
  }

  // Of a bundle: as many as leave every thread some bundles.
  int64_t bundle_rows(const std::vector<Member>& few, int64_t threads) const {
    const int64_t all = rows_of(few) * a_.num_kv_heads;
    return std::clamp<int64_t>(all / (4 * threads), 1, kQueries);
  }

  int64_t length(const Member& m) const {  // keys up to the last row's position
    const int64_t tokens = a_.query_start[m.sequence + 1] - a_.query_start[m.sequence];
    return a_.seq_lens[m.sequence] - tokens + (m.first + m.rows - 1) / group_ + 1;
  }

  double cost(const std::vector<Member>& bundle) const {
    double sum = 0;
    for (const Member& m : bundle) sum += double(length(m)) * double(m.rows + 8);
    return sum;
  }

  // Tiles of keys that all rows of both see whole, and that lie in the same blocks.
  int64_t shared_tiles(const Member& x, const Member& y) const {
    auto seen = [&](const Member& m) { return (length(m) - (m.rows - 1) / group_) / kKeys; };
    const int64_t most = std::min(seen(x), seen(y));
    auto table = [&](const Member& m) { return a_.block_tables + m.sequence * a_.table_width; };
    int64_t same = 0;
    for (int64_t begin = 0; same < most; ++same) {
      const int64_t end = ((same + 1) * kKeys + a_.block_size - 1) / a_.block_size;
      if (!std::equal(table(x) + begin, table(x) + end, table(y) + begin)) break;
      begin = end;
    }
    return same;
  }

  void add(int64_t head, const Member* members, int64_t count, int64_t rows, int64_t shared) {
    Tile tile{head, rows, members, count, int64_t(spans.size()), 0};
    const int64_t place = int64_t(tiles.size());
    for (int64_t k = 0; k < shared; ++k) spans.push_back({place, members[0].sequence, k, 0, tile.rows, kKeys});
    int64_t begin = 0;
    for (int64_t m = 0; m < count; begin += members[m].rows, ++m) {
      const int64_t keys = length(members[m]);
      for (int64_t k = shared; k * kKeys < keys; ++k)
        spans.push_back({place, members[m].sequence, k, begin, begin + members[m].rows,
                         std::min<int64_t>(kKeys, keys - k * kKeys)});
    }
    tile.end_span = int64_t(spans.size());
    tiles.push_back(tile);
  }

  const Attention& a_;
  const int64_t group_;
  std::vector<Member> members_;
};

}  // namespace folo::FOLO_ISA
