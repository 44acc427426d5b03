// x [m, k] times a packed weight: every output is one sum over k in order, in fp32, for every m.
//
// The weight's columns stand in tiles of 16, zero beyond n: [n / 16][k][16] in float32 and float16, and in
// bfloat16 [n / 16][k / 2][16][2], with k a multiple of 32, zero beyond the weight's own: the layout that
// AMX and vdpbf16ps take, and that the others split into its even and its odd elements.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "blocks.h"
#include "kernels.h"
#include "rows.h"
#include "simd.h"
#include "tiles.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {
namespace {

// Weights that a thread is going to need, fetched into its second cache while it multiplies others. Tiles are short,
// and a CPU that looks ahead by itself begins anew with each.
struct Ahead {
  static constexpr int64_t kLead = 16;        // steps
  const char *at = nullptr, *end = nullptr;  // what of the panel after this one is not fetched yet
  int64_t lines = 0;                         // of it, at each step of each block of rows; 0: there is one block

  // At step k of C tiles, of `line` bytes a step. One block of rows leaves no time for the next panel: what is fetched
  // are the weights of a few steps later.
  template <int C>
  void fetch(const char* tiles, int64_t line, int64_t depth, int64_t k) {
    if (!lines) {
      const int64_t later = k + kLead - depth;
      const char* from = later < 0 ? tiles + (k + kLead) * line : at ? at + later * line : nullptr;
      for (int c = 0; from && c < C; ++c) _mm_prefetch(from + c * depth * line, _MM_HINT_T1);
      return;
    }
    for (int64_t n = 0; n < lines && at < end; ++n, at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

// Where sums go: those of row `row` and of the columns of tile `tile` to the beginning.
struct Out {
  void* begin;
  bool wide;
  int64_t stride, row, tile;
  int64_t at(int64_t r, int64_t t) const { return (r - row) * stride + (t - tile) * kTile; }
};

template <typename T>
void write_tile(const Linear& a, const Out& out, int64_t row, int64_t tile, const Float* sums) {
  const int64_t column = tile * kTile;
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + column : nullptr;
  write(out.begin, out.wide, out.at(row, tile), sums, bias, int(std::min<int64_t>(kTile, a.n - column)));
}

// Sums of R rows and whole tiles to the output, straight from registers: inlined for that.
template <typename T, int R, int V>
[[gnu::always_inline]] inline void write_whole(const Linear& a, const Out& out, int64_t row, int64_t tile,
                                               const Float (&sums)[R][V]) {
  const T* bias = a.bias ? static_cast<const T*>(a.bias) + tile * kTile : nullptr;
  const auto write_to = [&](auto* begin) {
    each<R>([&](auto r) {
      auto* to = begin + out.at(row + r, tile);
      each<V>([&](auto v) {
        store(to + v * kLanes, bias ? sums[r][v] + load(bias + v * kLanes) : sums[r][v]);
      });
    });
  };
  if constexpr (!std::is_same_v<T, float>) {  // called twice it would not be inlined
    if (!out.wide) return write_to(static_cast<T*>(out.begin));
  }
  write_to(static_cast<float*>(out.begin));
}

// R rows times C tiles.
template <typename P, int R, int C>
void block(const Linear& a, const typename P::X* x, int64_t depth, int64_t row, int64_t tile,
           const Out& out, Ahead& ahead) {
  constexpr int V = C * kVectors;
  const auto* w = static_cast<const typename P::W*>(a.weight) + tile * depth * kTile;
  Float sums[R][V];
  each<R>([&](auto r) { each<V>([&](auto v) { sums[r][v] = zero(); }); });
  const typename P::X* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x + (row + r) * depth;
  // Cached for writing by the time sums are there: a store that has to wait for memory holds up the next block's.
  const int64_t size = out.wide ? sizeof(float) : sizeof(typename P::T);
  for (int r = 0; r < R; ++r)
    for (int64_t c = 0; c < C * kTile * size; c += 64)
      __builtin_prefetch(static_cast<const char*>(out.begin) + out.at(row + r, tile) * size + c, 1);
  for (int64_t k = 0; k < depth; ++k) {
    ahead.fetch<C>(reinterpret_cast<const char*>(w), kTile * int64_t(sizeof(*w)), depth, k);
    decltype(P::columns(w)) columns[V];
    each<V>([&](auto v) {
      columns[v] = P::columns(w + ((v / kVectors) * depth + k) * kTile + (v % kVectors) * kLanes);
    });
    each<R>([&](auto r) {
      const auto x = P::row(rows[r] + k);
      each<V>([&](auto v) { sums[r][v] = P::step(sums[r][v], columns[v], x); });
    });
  }
  if (a.n - tile * kTile >= C * kTile) return write_whole<typename P::T>(a, out, row, tile, sums);
  Float copies[R][V];  // for write_tile, which takes an address: what has one is kept in memory throughout
  each<R>([&](auto r) { each<V>([&](auto v) { copies[r][v] = sums[r][v]; }); });
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) write_tile<typename P::T>(a, out, row + r, tile + c, copies[r] + c * kVectors);
}

// A thread's products of rows of x with a panel of tiles.
template <typename P>
struct Multiplier {
  static constexpr int kHigh = kRows, kTiles = kWide, kMost = 96;  // rows at once; tiles; rows of a chunk
  // Of several chunks of x, each is multiplied with so many tiles in turn: both stay in the second cache for that.
  static constexpr int kPanel = 4;
  static constexpr int64_t kChunkBytes = 256 << 10;

  static bool fetches_ahead(int64_t chunks) { return chunks == 1; }

  void panel(const Linear& a, const typename P::X* x, int64_t depth, int64_t first, int64_t end, int64_t tile,
             int64_t last, const Out& out, Ahead& ahead) {
    in_blocks<kTiles>(tile, last, [&](auto tiles, int64_t at) {
      rows<decltype(tiles)::value>(a, x, depth, first, end, at, out, ahead);
    });
  }

 private:
  template <int C>
  void rows(const Linear& a, const typename P::X* x, int64_t depth, int64_t first, int64_t end, int64_t tile,
            const Out& out, Ahead& ahead) {
    in_blocks<kRows>(first, end, [&](auto rows, int64_t row) {
      block<P, decltype(rows)::value, C>(a, x, depth, row, tile, out, ahead);
    });
  }
};

#ifdef FOLO_AMX
template <>
struct Multiplier<Pairs> {
  static constexpr int kHigh = 2 * amx::kTileRows, kTiles = 2, kPanel = 2, kMost = 4 * kHigh;
  static constexpr int64_t kChunkBytes = 1 << 20;
  // Pairs of a weight that all rows are multiplied with before the next ones: few enough to stay in the first cache.
  static constexpr int64_t kPart = 128;
  // How far ahead weights are fetched that one block of rows reads: two tiles of it are what memory takes its time for.
  static constexpr int64_t kLead = 2 * kTile;

  static bool fetches_ahead(int64_t) { return true; }

  void panel(const Linear& a, const uint32_t* x, int64_t depth, int64_t first, int64_t end, int64_t tile, int64_t last,
             const Out& out, Ahead& ahead) {
    const auto* left = static_cast<const uint32_t*>(a.weight) + tile * depth * kTile;
    const auto* right = last - tile > 1 ? left + depth * kTile : nullptr;
    const bool several = end - first > kHigh;
    const int64_t part = several ? kPart : depth;
    alignas(64) float sums[kMost][2 * kTile];
    for (int64_t k = 0; k < depth; k += part) {
      const char* coming = k + part < depth ? reinterpret_cast<const char*>(left + (k + part) * kTile) : ahead.at;
      amx::in_even_blocks(first, end, [&](int64_t row, int count, int64_t fresh) {
        // Of the lines to come, each block of rows fetches every other, every third, or every fourth. Inlined: gcc
        // drops the call of a function that does nothing else.
        const int64_t own = (fresh - first) / count, blocks = (end - first + count - 1) / count;
        const auto fetch = [&](int64_t pair) __attribute__((always_inline)) {
          const char* from = coming ? coming + pair * 64 : nullptr;
          if (!several) {
            const int64_t later = pair + kLead - depth;
            from = later < 0 ? reinterpret_cast<const char*>(left + (pair + kLead) * kTile)
                             : coming ? coming + later * 64 : nullptr;
          }
          for (int64_t line = own; from && line < kTile; line += blocks)
            for (int64_t t = 0; t < last - tile; ++t) _mm_prefetch(from + (t * depth + line) * 64, _MM_HINT_T1);
        };
        amx::block_of(registers_, count, x + row * depth + k, depth, left + k * kTile,
                      right ? right + k * kTile : nullptr, kTile, std::min(part, depth - k), k > 0,
                      sums[fresh - first], 2 * kTile, fetch);
      });
    }
    amx::in_even_blocks(first, end, [&](int64_t row, int count, int64_t fresh) {
      for (int64_t r = fresh - row; r < count; ++r) {
        for (int64_t c = 0; c < last - tile; ++c) {
          const Float sum = load(&sums[fresh - first + r][c * kTile]);
          write_tile<bf16>(a, out, row + r, tile + c, &sum);
        }
      }
    });
  }

 private:
  amx::Registers registers_;
};
#endif

// Chunks of rows times panels of tiles, taken by threads in order: neighbours share a panel. Where the
// weight is a gate's and an up projection's, a panel of each goes to memory at hand, and what they come to to
// the output.
template <typename P>
void product(const Linear& a, const typename P::X* x, int64_t depth) {
  using T = typename P::T;
  using M = Multiplier<P>;
  constexpr int64_t kWidth = M::kPanel * kTile;
  const int64_t all_tiles = (a.n + kTile - 1) / kTile, tiles = a.gated ? all_tiles / 2 : all_tiles;
  const int64_t fit = M::kChunkBytes / int64_t(depth * sizeof(*x)) / M::kHigh * M::kHigh;
  const int64_t height = std::clamp<int64_t>(fit, M::kHigh, M::kMost), chunks = (a.m + height - 1) / height;
  // Of one chunk's panels, every thread gets as many, some of them a tile narrower.
  const int64_t width = chunks == 1 ? M::kTiles : M::kPanel, least = (tiles + width - 1) / width;
  const int64_t threads = chunks == 1 ? omp_get_max_threads() : 1;
  const int64_t panels = std::min(tiles, (least + threads - 1) / threads * threads);
  const int64_t tile_bytes = depth * kTile * int64_t(sizeof(typename P::W));
#pragma omp parallel
  {
    M multiplier;
    alignas(64) T both[M::kMost * 2 * kWidth];
    // Weights from `tile` on, `next` being those that come after.
    auto panel = [&](int64_t first, int64_t end, int64_t tile, int64_t last, int64_t next, const Out& out) {
      Ahead ahead;
      if (const int64_t blocks = (end - first + M::kHigh - 1) / M::kHigh; blocks > 1)
        ahead.lines = (M::kTiles + blocks - 1) / blocks;
      if (M::fetches_ahead(chunks) && next < all_tiles) {
        ahead.at = static_cast<const char*>(a.weight) + next * tile_bytes;
        ahead.end = ahead.at + std::min<int64_t>(all_tiles - next, M::kTiles) * tile_bytes;
      }
      multiplier.panel(a, x, depth, first, end, tile, last, out, ahead);
    };
    auto compute = [&](int64_t task) {
      const int64_t first = task % chunks * height, end = std::min(a.m, first + height);
      const int64_t tile = task / chunks * tiles / panels, last = (task / chunks + 1) * tiles / panels;
      if (!a.gated) return panel(first, end, tile, last, last, {a.out, a.wide, a.n, 0, 0});
      panel(first, end, tile, last, tiles + tile, {both, false, 2 * kWidth, first, tile});
      panel(first, end, tiles + tile, tiles + last, last, {both + kWidth, false, 2 * kWidth, first, tiles + tile});
      for (int64_t row = first; row < end; ++row) {
        const T* gate = both + (row - first) * 2 * kWidth;
        silu_mul_row(gate, gate + kWidth, static_cast<T*>(a.out) + row * tiles * kTile + tile * kTile,
                     (last - tile) * kTile);
      }
    };
    const int64_t tasks = panels * chunks;
    if (M::fetches_ahead(chunks)) {  // what comes after a panel has to be this thread's too
#pragma omp for schedule(static) nowait
      for (int64_t task = 0; task < tasks; ++task) compute(task);
    } else {  // a core that others use as well takes fewer
#pragma omp for schedule(dynamic) nowait
      for (int64_t task = 0; task < tasks; ++task) compute(task);
    }
  }
}

// The rows of x as the steps read them, zero beyond k.
template <typename P>
void linear_of(const Linear& a) {
  using T = typename P::T;
  using X = typename P::X;
  constexpr int64_t kPer = std::is_same_v<T, bf16> ? 2 : 1;
  int64_t depth = std::is_same_v<T, bf16> ? (a.k + 31) / 32 * 16 : a.k;
  const T* x = static_cast<const T*>(a.x);
  if constexpr (sizeof(X) == kPer * sizeof(T)) {
    if (depth * kPer == a.k) return product<P>(a, reinterpret_cast<const X*>(x), depth);
  }
  std::vector<X> wide(size_t(a.m * depth));
  for (int64_t row = 0; row < a.m; ++row) {
    X* to = wide.data() + row * depth;
    if constexpr (sizeof(X) == kPer * sizeof(T)) {
      std::memcpy(static_cast<void*>(to), x + row * a.k, size_t(a.k) * sizeof(T));
    } else {
      auto* floats = reinterpret_cast<float*>(to);
      for (int64_t k = 0; k < a.k; ++k) floats[k] = folo::widen(x[row * a.k + k]);
    }
  }
  product<P>(a, wide.data(), depth);
}

}  // namespace

void linear(const Linear& a) {
  switch (a.dtype) {
    case Dtype::kFloat32: return linear_of<Singles<float>>(a);
    case Dtype::kFloat16: return linear_of<Singles<fp16>>(a);
    case Dtype::kBFloat16: return linear_of<Pairs>(a);
  }
}

}  // namespace folo::FOLO_ISA
