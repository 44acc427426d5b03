// x [m, k] times a weight of 2, 4 or 8 bits in groups along k: folo/ops/quantized.py says how it lies.
//
// code - zero is a whole number of at most 8 bits, exact in bfloat16. Spans of at most 128 columns, of one
// scale each, are widened and multiplied with all rows that a thread has, their sums scaled and added in
// order, in fp32: one order, which the weight's layout decides, for every m.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "blocks.h"
#include "codes.h"
#include "kernels.h"
#include "rows.h"
#include "simd.h"
#include "tiles.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {
namespace {

constexpr int kBlock = 32;  // columns
constexpr int kSpan = 4;    // blocks that are widened at once, at most
constexpr int kMost = 96;   // rows of a chunk
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

// A span of columns of one scale in some tiles, and what stands for the rows so far: [row][tiles * 16].
template <typename W>
struct Span {
  const int32_t* codes;  // `words` words of each row in each tile, tiles `code_stride` apart
  const uint8_t* zeros;  // of each tile, `part_stride` apart, like the scales
  const fp16* scales;
  int64_t words, code_stride, part_stride;
  int64_t ahead, part_ahead;  // from its codes, and from its zeros and scales, to those of the next panel
  W* wide;                    // where tiles are kept that were widened, `kWideTile` apart
};

// Zeros and scales are read a line here and there, which no prefetcher of the hardware foresees.
template <typename W>
void fetch_parts(const Span<W>& s, int64_t tiles) {
  for (int64_t at = s.part_ahead, end = at + tiles * s.part_stride; at < end; at += s.part_stride) {
    _mm_prefetch(s.zeros + at, _MM_HINT_T1);
    _mm_prefetch(s.scales + at, _MM_HINT_T1);
  }
}

// A thread's products of rows of x with spans of kTiles tiles.
template <typename P, int Bits>
struct Multiplier {
  static constexpr int kTiles = kWide, kSpans = 1;  // tiles at once, and spans of them that are kept widened
  using X = typename P::X;
  using W = typename P::W;
  using C = Codes<P, Bits>;
  static constexpr int64_t kWideTile = kSpan * kBlock / (32 / Bits / C::kUnits) * kTile;

  void start(const Span<W>&, int64_t) {}

  // The first rows are multiplied as the span is widened: the two keep different parts of the core busy.
  void span(const X* x, int64_t stride, int64_t count, const Span<W>& s, const Span<W>&, int64_t tiles, float* totals) {
    fetch_parts(s, tiles);
    if (tiles == kTiles) return rows<kTiles>(x, stride, count, s, totals);
    for (int64_t t = 0; t < tiles; ++t) {
      Span<W> one = s;
      one.codes += t * s.code_stride;
      one.zeros += t * s.part_stride;
      one.scales += t * s.part_stride;
      rows<1>(x, stride, count, one, totals + t * kTile);
    }
  }

 private:
  template <int T>
  void rows(const X* x, int64_t stride, int64_t count, const Span<W>& s, float* totals) {
    if (count <= kRows) {
      return in_blocks<kRows>(0, count, [&](auto rows, int64_t) { first<rows(), T, false>(x, stride, s, totals); });
    }
    first<kRows, T, true>(x, stride, s, totals);
    in_blocks<kRows>(kRows, count, [&](auto rows, int64_t row) {
      next<rows(), T>(x + row * stride, stride, s, totals + row * kTiles * kTile);
    });
  }

  template <int R, int T, bool Keep>
  static void first(const X* x, int64_t stride, const Span<W>& s, float* totals) {
    constexpr int V = T * kVectors;
    Whole zeros[V];
    for (int v = 0; v < V; ++v) zeros[v] = C::zeros(s.zeros + v / kVectors * s.part_stride + v % kVectors * kLanes);
    Float sums[R][V];
    for (auto& sum : sums)
      for (auto& one : sum) one = zero();
    const int32_t* words = s.codes;
    W* wide = s.wide;
    for (int64_t word = 0; word < s.words; ++word, words += kTile, x += C::kUnits, wide += C::kUnits * kTile) {
      for (int t = 0; t < T; ++t) _mm_prefetch(words + t * s.code_stride + s.ahead, _MM_HINT_T1);
      each<C::kUnits>([&](auto unit) {
        typename C::Column columns[V];
        for (int v = 0; v < V; ++v) {
          const int lane = v % kVectors * kLanes;
          columns[v] = C::template column<unit()>(load_words(words + v / kVectors * s.code_stride + lane), zeros[v]);
          if constexpr (Keep) keep(wide + v / kVectors * kWideTile + unit() * kTile + lane, columns[v]);
        }
        for (int r = 0; r < R; ++r) {
          const auto one = P::row(x + r * stride + unit());
          for (int v = 0; v < V; ++v) sums[r][v] = P::step(sums[r][v], columns[v], one);
        }
      });
    }
    add<R, T>(sums, s, totals);
  }

  template <int R, int T>
  static void next(const X* x, int64_t stride, const Span<W>& s, float* totals) {
    constexpr int V = T * kVectors;
    Float sums[R][V];
    for (auto& sum : sums)
      for (auto& one : sum) one = zero();
    const W* wide = s.wide;
    for (int64_t unit = 0; unit < s.words * C::kUnits; ++unit, wide += kTile) {
      decltype(P::columns(wide)) columns[V];
      for (int v = 0; v < V; ++v)
        columns[v] = P::columns(wide + v / kVectors * kWideTile + v % kVectors * kLanes);
      for (int r = 0; r < R; ++r) {
        const auto one = P::row(x + r * stride + unit);
        for (int v = 0; v < V; ++v) sums[r][v] = P::step(sums[r][v], columns[v], one);
      }
    }
    add<R, T>(sums, s, totals);
  }

  // Scaled sums are added to what stands.
  template <int R, int T>
  static void add(const Float (&sums)[R][T * kVectors], const Span<W>& s, float* totals) {
    for (int v = 0; v < T * kVectors; ++v) {
      const Float scale = load(s.scales + v / kVectors * s.part_stride + v % kVectors * kLanes);
      for (int r = 0; r < R; ++r) {
        float* total = totals + r * kTiles * kTile + v * kLanes;
        store(total, fma(sums[r][v], scale, load(total)));
      }
    }
  }
};

#ifdef FOLO_AMX
// A span is widened while the one before is multiplied: tiles are multiplied by a part of the core of its own.
template <int Bits>
struct Multiplier<Pairs, Bits> {
  static constexpr int kTiles = 2, kSpans = 2, kHigh = 2 * amx::kTileRows;
  static constexpr int64_t kWideTile = kSpan * kBlock / 2 * kTile;
  using C = Codes<Pairs, Bits>;

  void start(const Span<uint32_t>& s, int64_t tiles) {
    for (int64_t pair = 0; pair < s.words * C::kUnits; pair += kTile) widen(s, pair, tiles);
  }

  void span(const uint32_t* x, int64_t stride, int64_t count, const Span<uint32_t>& s, const Span<uint32_t>& next,
            int64_t tiles, float* totals) {
    fetch_parts(s, tiles);
    alignas(64) float sums[kHigh][2 * kTile];
    amx::in_even_blocks(0, count, [&](int64_t row, int some, int64_t fresh) {
      amx::block_of(registers_, some, x + row * stride, stride, s.wide, tiles > 1 ? s.wide + kWideTile : nullptr,
                    kTile, s.words * C::kUnits, false, sums[0], 2 * kTile, [&](int64_t pair) {
                      if (fresh == 0 && pair < next.words * C::kUnits) widen(next, pair, tiles);
                    });
      for (int64_t t = 0; t < tiles; ++t) {
        const Float scale = load(s.scales + t * s.part_stride);
        for (int64_t r = fresh - row; r < some; ++r) {
          float* total = totals + (row + r) * kTiles * kTile + t * kTile;
          store(total, fma(load(&sums[r][t * kTile]), scale, load(total)));
        }
      }
    });
  }

 private:
  // kTile pairs of columns from `pair` on.
  static void widen(const Span<uint32_t>& s, int64_t pair, int64_t tiles) {
    for (int64_t t = 0; t < tiles; ++t) {
      const Whole zeros = C::zeros(s.zeros + t * s.part_stride);
      const int32_t* words = s.codes + t * s.code_stride + pair / C::kUnits * kTile;
      uint32_t* wide = s.wide + t * kWideTile + pair * kTile;
      for (int word = 0; word < kTile / C::kUnits; ++word, words += kTile, wide += C::kUnits * kTile) {
        _mm_prefetch(words + s.ahead, _MM_HINT_T1);
        each<C::kUnits>([&](auto unit) {
          keep(wide + unit() * kTile, C::template column<unit()>(load_words(words), zeros));
        });
      }
    }
  }

  amx::Registers registers_;
};
#endif

// x: [m][units], a unit being what a step takes: a column, or a pair.
template <typename T, typename P, int Bits>
void product(const Quantized& a, const typename P::X* x) {
  using M = Multiplier<P, Bits>;
  using W = typename P::W;
  constexpr int64_t kUnits = Bits * Codes<P, Bits>::kUnits;  // of a block
  const int64_t all_tiles = (a.n + kTile - 1) / kTile, panels = (all_tiles + M::kTiles - 1) / M::kTiles;
  const int64_t chunks = (a.m + kMost - 1) / kMost, stride = a.blocks * kUnits, tile_codes = a.blocks * Bits * kTile;
  const int64_t spans = (a.blocks + a.span - 1) / a.span;
#pragma omp parallel
  {
    M multiplier;
    alignas(64) W wide[M::kSpans * M::kTiles * M::kWideTile];
    alignas(64) float totals[kMost * M::kTiles * kTile];
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < panels * chunks; ++task) {
      const int64_t first = task % chunks * kMost, count = std::min<int64_t>(kMost, a.m - first);
      const int64_t tile = task / chunks * M::kTiles, tiles = std::min<int64_t>(M::kTiles, all_tiles - tile);
      const int64_t tiles_ahead = tile + 2 * M::kTiles <= all_tiles ? M::kTiles : 0;
      std::fill_n(totals, count * M::kTiles * kTile, 0.0f);
      auto span_of = [&](int64_t number) {
        const int64_t at = std::min(number * a.span, a.blocks), blocks = std::min(a.span, a.blocks - at);
        const int64_t parts = (tile * spans + number) * kTile;
        return Span<W>{a.codes + tile * tile_codes + at * Bits * kTile, a.zeros + parts, a.scales + parts,
                       blocks * Bits, tile_codes, spans * kTile, tiles_ahead * tile_codes,
                       tiles_ahead * spans * kTile, wide + number % M::kSpans * M::kTiles * M::kWideTile};
      };
      multiplier.start(span_of(0), tiles);
      for (int64_t number = 0; number < spans; ++number)
        multiplier.span(x + first * stride + number * a.span * kUnits, stride, count, span_of(number),
                        span_of(number + 1), tiles, totals);
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t column = (tile + t) * kTile;
          Float sums[kVectors];
          for (int v = 0; v < kVectors; ++v) sums[v] = load(totals + (r * M::kTiles + t) * kTile + v * kLanes);
          write(a.out, a.wide, (first + r) * a.n + column, sums,
                a.bias ? static_cast<const T*>(a.bias) + column : nullptr, int(std::min<int64_t>(kTile, a.n - column)));
        }
      }
    }
  }
}

template <typename T, typename P>
void by_bits(const Quantized& a, const typename P::X* x) {
  switch (a.bits) {
    case 2: return product<T, P, 2>(a, x);
    case 4: return product<T, P, 4>(a, x);
    case 8: return product<T, P, 8>(a, x);
  }
}

// Rows of x as the steps read them: columns where the weight has them, zero where it has none.
template <typename T>
void quantized_of(const Quantized& a) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t places = a.blocks * kBlock;
  constexpr bool kStored = kPairs && std::is_same_v<T, bf16>;
  using P = std::conditional_t<kStored, Pairs, Singles<float>>;
  using E = std::conditional_t<kStored, T, float>;
  if constexpr (std::is_same_v<E, T>) {
    if (!a.columns && places == a.k) return by_bits<T, P>(a, reinterpret_cast<const typename P::X*>(x));
  }
  std::vector<E> rows(size_t(a.m * places));
  for (int64_t row = 0; row < a.m; ++row) {
    for (int64_t place = 0; place < places; ++place) {
      const uint64_t column = uint64_t(a.columns ? a.columns[place] : place);
      if (column >= uint64_t(a.k)) continue;
      const T value = x[row * a.k + int64_t(column)];
      if constexpr (kStored) {
        rows[size_t(row * places + place)] = value;
      } else {
        rows[size_t(row * places + place)] = folo::widen(value);
      }
    }
  }
  by_bits<T, P>(a, reinterpret_cast<const typename P::X*>(rows.data()));
}

}  // namespace

void quantized(const Quantized& a) { FOLO_BY_DTYPE(a.dtype, quantized_of, a) }

}  // namespace folo::FOLO_ISA
