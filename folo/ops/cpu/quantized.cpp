// x [m, k] times a weight of 2, 4 or 8 bits in groups along k: folo/ops/quantized.py says how it lies.
//
// code - zero is a whole number of at most 8 bits, exact in bfloat16. Spans of at most 128 columns, of one
// scale each, are widened and multiplied with all rows that a thread has, their sums scaled and added in
// order, in fp32: one order, which the weight's layout decides, for every m.
#include <omp.h>

#include <algorithm>
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

constexpr int kBlock = 32;  // columns
constexpr int kSpan = 4;    // blocks that are widened at once, at most
constexpr int kMost = 96;   // rows of a chunk
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
constexpr bool kPairs = true;
#else
constexpr bool kPairs = false;
#endif

#ifdef __AVX512F__
using Whole = __m512i;  // kLanes int32
inline Whole load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Whole masked(Whole a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
inline Whole minus(Whole a, Whole b) { return _mm512_sub_epi32(a, b); }
inline Whole load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Float floats(Whole a) { return {_mm512_cvtepi32_ps(a)}; }
template <int By>
Whole shifted(Whole a) {
  return _mm512_srli_epi32(a, By);
}
#else
using Whole = __m256i;
inline Whole load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Whole masked(Whole a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
inline Whole minus(Whole a, Whole b) { return _mm256_sub_epi32(a, b); }
inline Whole load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Float floats(Whole a) { return {_mm256_cvtepi32_ps(a)}; }
template <int By>
Whole shifted(Whole a) {
  return _mm256_srli_epi32(a, By);
}
#endif

// The kUnits columns, or pairs of them, of kLanes words of codes, as P's steps take them.
template <typename P, int Bits>
struct Codes {
  static constexpr int kUnits = 32 / Bits;
  using Column = Float;
  static Whole zeros(const uint8_t* at) { return load_bytes(at); }
  template <int Unit>
  static Column column(Whole words, Whole zeros) {
    return floats(minus(masked(shifted<Bits * (Unit / 2) + 16 * (Unit % 2)>(words), (1 << Bits) - 1), zeros));
  }
};
inline void keep(float* to, Float column) { store(to, column); }

#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
template <int Bits>
struct Codes<Pairs, Bits> {
  static constexpr int kUnits = 16 / Bits, kMask = (1 << Bits) - 1;
  using Column = __m512i;
  static Whole zeros(const uint8_t* at) {
    const Whole once = load_bytes(at);
    return _mm512_or_si512(once, _mm512_slli_epi32(once, 16));
  }
  template <int Unit>
  static Column column(Whole words, Whole zeros) {
    return narrowed(_mm512_sub_epi16(masked(shifted<Bits * Unit>(words), kMask | kMask << 16), zeros));
  }

 private:
  // bfloat16 of the whole numbers in the halves of each lane.
  static __m512i narrowed(__m512i a) {
    if constexpr (Bits < 8) {  // their last five bits say which of these they are
      alignas(64) static const uint16_t kValues[32] = {
          0x0000, 0x3F80, 0x4000, 0x4040, 0x4080, 0x40A0, 0x40C0, 0x40E0, 0x4100, 0x4110, 0x4120,
          0x4130, 0x4140, 0x4150, 0x4160, 0x4170, 0xC180, 0xC170, 0xC160, 0xC150, 0xC140, 0xC130,
          0xC120, 0xC110, 0xC100, 0xC0E0, 0xC0C0, 0xC0A0, 0xC080, 0xC040, 0xC000, 0xBF80};
      return _mm512_permutexvar_epi16(a, _mm512_load_si512(kValues));
    } else {
      const __m512i even = _mm512_srai_epi32(_mm512_slli_epi32(a, 16), 16), odd = _mm512_srai_epi32(a, 16);
      const __m512i low = _mm512_castps_si512(_mm512_cvtepi32_ps(even));
      const __m512i high = _mm512_castps_si512(_mm512_cvtepi32_ps(odd));
      return _mm512_or_si512(_mm512_srli_epi32(low, 16), _mm512_and_si512(high, _mm512_set1_epi32(int(0xFFFF0000))));
    }
  }
};
inline void keep(uint32_t* to, __m512i column) { _mm512_storeu_si512(to, column); }
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
  static constexpr int kTiles = kWide;
  using X = typename P::X;
  using W = typename P::W;
  using C = Codes<P, Bits>;
  static constexpr int64_t kWideTile = kSpan * kBlock / (32 / Bits / C::kUnits) * kTile;

  // The first rows are multiplied as the span is widened: the two keep different parts of the core busy.
  void span(const X* x, int64_t stride, int64_t count, const Span<W>& s, int64_t tiles, float* totals) {
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
          const auto one = P::row(read(x + r * stride + unit()));
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
        const auto one = P::row(read(x + r * stride + unit));
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
template <int Bits>
struct Multiplier<Pairs, Bits> {
  static constexpr int kTiles = 2, kHigh = 2 * amx::kTileRows;
  static constexpr int64_t kWideTile = kSpan * kBlock / 2 * kTile;
  using C = Codes<Pairs, Bits>;

  void span(const uint32_t* x, int64_t stride, int64_t count, const Span<uint32_t>& s, int64_t tiles, float* totals) {
    fetch_parts(s, tiles);
    for (int64_t t = 0; t < tiles; ++t) {
      const Whole zeros = C::zeros(s.zeros + t * s.part_stride);
      const int32_t* words = s.codes + t * s.code_stride;
      uint32_t* wide = s.wide + t * kWideTile;
      for (int64_t word = 0; word < s.words; ++word, words += kTile, wide += C::kUnits * kTile) {
        _mm_prefetch(words + s.ahead, _MM_HINT_T1);
        each<C::kUnits>([&](auto unit) {
          keep(wide + unit() * kTile, C::template column<unit()>(load_words(words), zeros));
        });
      }
    }
    alignas(64) float sums[kHigh][2 * kTile];
    for (int64_t row = 0; row < count; row += kHigh) {
      const int some = int(std::min<int64_t>(kHigh, count - row));
      amx::block_of(registers_, some, x + row * stride, stride, s.wide, tiles > 1 ? s.wide + kWideTile : nullptr,
                    kTile, s.words * C::kUnits, sums[0], 2 * kTile);
      for (int64_t t = 0; t < tiles; ++t) {
        const Float scale = load(s.scales + t * s.part_stride);
        for (int r = 0; r < some; ++r) {
          float* total = totals + (row + r) * kTiles * kTile + t * kTile;
          store(total, fma(load(&sums[r][t * kTile]), scale, load(total)));
        }
      }
    }
  }

 private:
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
    alignas(64) W wide[M::kTiles * M::kWideTile];
    alignas(64) float totals[kMost * M::kTiles * kTile];
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < panels * chunks; ++task) {
      const int64_t first = task % chunks * kMost, count = std::min<int64_t>(kMost, a.m - first);
      const int64_t tile = task / chunks * M::kTiles, tiles = std::min<int64_t>(M::kTiles, all_tiles - tile);
      const int64_t tiles_ahead = tile + 2 * M::kTiles <= all_tiles ? M::kTiles : 0;
      std::fill_n(totals, count * M::kTiles * kTile, 0.0f);
      for (int64_t at = 0; at < a.blocks; at += a.span) {
        const int64_t parts = (tile * spans + at / a.span) * kTile, blocks = std::min(a.span, a.blocks - at);
        const Span<W> span{a.codes + tile * tile_codes + at * Bits * kTile, a.zeros + parts, a.scales + parts,
                           blocks * Bits, tile_codes, spans * kTile, tiles_ahead * tile_codes,
                           tiles_ahead * spans * kTile, wide};
        multiplier.span(x + first * stride + at * kUnits, stride, count, span, tiles, totals);
      }
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t column = (tile + t) * kTile;
          Float sums[kVectors];
          for (int v = 0; v < kVectors; ++v) sums[v] = load(totals + (r * M::kTiles + t) * kTile + v * kLanes);
          write(static_cast<T*>(a.out) + (first + r) * a.n + column, sums,
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
