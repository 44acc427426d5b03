// x [m, k] times a weight of 2, 4 or 8 bits in groups along k: folo/ops/quantized.py says how it lies.
//
// code - zero is a whole number of at most 8 bits, exact in bfloat16. Spans of at most 128 columns, of one
// scale each, are widened into a cache, multiplied with all rows that a thread has, their sums scaled and
// added in order, in fp32: one order, which the weight's layout decides, for every m.
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

// In float32, whatever the rows are stored in.
template <typename Stored>
struct Wide : Singles<float> {
  using T = Stored;
};

#ifdef __AVX512F__
using Whole = __m512i;  // kLanes int32
inline Whole load_words(const int32_t* p) { return _mm512_loadu_si512(p); }
inline Whole shifted(Whole a, int by) { return _mm512_srl_epi32(a, _mm_cvtsi32_si128(by)); }
inline Whole masked(Whole a, int mask) { return _mm512_and_si512(a, _mm512_set1_epi32(mask)); }
inline Whole minus(Whole a, Whole b) { return _mm512_sub_epi32(a, b); }
inline Whole load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Float floats(Whole a) { return {_mm512_cvtepi32_ps(a)}; }
#else
using Whole = __m256i;
inline Whole load_words(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Whole shifted(Whole a, int by) { return _mm256_srl_epi32(a, _mm_cvtsi32_si128(by)); }
inline Whole masked(Whole a, int mask) { return _mm256_and_si256(a, _mm256_set1_epi32(mask)); }
inline Whole minus(Whole a, Whole b) { return _mm256_sub_epi32(a, b); }
inline Whole load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline Float floats(Whole a) { return {_mm256_cvtepi32_ps(a)}; }
#endif

// `count` words of 16 rows each, from `words`, as columns [32 count / bits][16] of code - zero.
template <int Bits>
void widen(const int32_t* words, int64_t count, const uint8_t* zeros, float* to) {
  constexpr int kMask = (1 << Bits) - 1;
  Whole zero[kVectors];
  for (int v = 0; v < kVectors; ++v) zero[v] = load_bytes(zeros + v * kLanes);
  for (int64_t word = 0; word < count; ++word, words += kTile) {
    for (int v = 0; v < kVectors; ++v) {
      const Whole all = load_words(words + v * kLanes);
      for (int pair = 0; pair < 16 / Bits; ++pair)
        for (int odd = 0; odd < 2; ++odd)
          store(to + (2 * pair + odd) * kTile + v * kLanes,
                floats(minus(masked(shifted(all, Bits * pair + 16 * odd), kMask), zero[v])));
    }
    to += 32 / Bits * kTile;
  }
}

#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
// bfloat16 of the whole numbers in the halves of each lane.
template <int Bits>
__m512i narrowed(__m512i a) {
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

// As pairs of columns [16 count / bits][16] in bfloat16.
template <int Bits>
void widen(const int32_t* words, int64_t count, const uint8_t* zeros, uint32_t* to) {
  constexpr int kMask = (1 << Bits) - 1;
  const Whole zero = load_bytes(zeros), both = _mm512_or_si512(zero, _mm512_slli_epi32(zero, 16));
  for (int64_t word = 0; word < count; ++word, words += kTile) {
    const Whole all = load_words(words);
    for (int pair = 0; pair < 16 / Bits; ++pair, to += kTile) {
      const Whole codes = masked(shifted(all, Bits * pair), kMask | kMask << 16);
      _mm512_storeu_si512(to, narrowed<Bits>(_mm512_sub_epi16(codes, both)));
    }
  }
}
#endif

// Scaled sums are added to what stands for the rows and columns so far.
inline void add(float* total, Float sum, Float scale) { store(total, fma(sum, scale, load(total))); }

// A thread's products of rows of x with spans of kTiles tiles, widened: to totals [row][kTiles * 16].
template <typename P>
struct Multiplier {
  static constexpr int kTiles = kWide;
  using X = typename P::X;
  using W = typename P::W;

  template <int C>
  void rows(const X* x, int64_t stride, int64_t rows, const W* w, int64_t tile_stride, int64_t depth,
            const Float* scales, float* totals) {
    in_blocks<kRows>(0, rows, [&](auto count, int64_t first) {
      block<count(), C>(x + first * stride, stride, w, tile_stride, depth, scales, totals + first * kTiles * kTile);
    });
  }

  void panel(const X* x, int64_t stride, int64_t count, const W* w, int64_t tile_stride, int64_t depth,
             int64_t tiles, const Float* scales, float* totals) {
    if (tiles == kTiles) return rows<kTiles>(x, stride, count, w, tile_stride, depth, scales, totals);
    for (int64_t t = 0; t < tiles; ++t)
      rows<1>(x, stride, count, w + t * tile_stride, tile_stride, depth, scales + t * kVectors, totals + t * kTile);
  }

 private:
  template <int R, int C>
  static void block(const X* x, int64_t stride, const W* w, int64_t tile_stride, int64_t depth, const Float* scales,
                    float* totals) {
    constexpr int V = C * kVectors;
    Float sums[R][V];
    for (auto& sum : sums)
      for (auto& s : sum) s = zero();
    for (int64_t k = 0; k < depth; ++k) {
      decltype(P::columns(w)) columns[V];
      for (int v = 0; v < V; ++v)
        columns[v] = P::columns(w + v / kVectors * tile_stride + k * kTile + v % kVectors * kLanes);
      for (int r = 0; r < R; ++r) {
        const auto one = P::row(x[r * stride + k]);
        for (int v = 0; v < V; ++v) sums[r][v] = P::step(sums[r][v], columns[v], one);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) add(totals + r * kTiles * kTile + v * kLanes, sums[r][v], scales[v]);
  }
};

#ifdef FOLO_AMX
template <>
struct Multiplier<Pairs> {
  static constexpr int kTiles = 2, kHigh = 2 * amx::kTileRows;

  void panel(const uint32_t* x, int64_t stride, int64_t count, const uint32_t* w, int64_t tile_stride, int64_t depth,
             int64_t tiles, const Float* scales, float* totals) {
    alignas(64) float sums[kHigh][2 * kTile];
    for (int64_t row = 0; row < count; row += kHigh) {
      const int some = int(std::min<int64_t>(kHigh, count - row));
      amx::block_of(registers_, some, x + row * stride, stride, w, tiles > 1 ? w + tile_stride : nullptr, kTile, depth,
                    sums[0], 2 * kTile);
      for (int r = 0; r < some; ++r)
        for (int64_t t = 0; t < tiles; ++t)
          add(totals + (row + r) * kTiles * kTile + t * kTile, load(&sums[r][t * kTile]), scales[t]);
    }
  }

 private:
  amx::Registers registers_;
};
#endif

// x: [m][units], a unit being kPer columns.
template <typename P, int Bits>
void product(const Quantized& a, const typename P::X* x) {
  using T = typename P::T;
  using W = typename P::W;
  using M = Multiplier<P>;
  constexpr int kPer = std::is_same_v<W, float> ? 1 : 2;
  constexpr int64_t kUnits = kBlock / kPer, kTileStride = kSpan * kUnits * kTile;
  const int64_t all_tiles = (a.n + kTile - 1) / kTile, panels = (all_tiles + M::kTiles - 1) / M::kTiles;
  const int64_t chunks = (a.m + kMost - 1) / kMost, stride = a.blocks * kUnits;
  const int64_t spans = (a.blocks + a.span - 1) / a.span;
#pragma omp parallel
  {
    M multiplier;
    alignas(64) W wide[M::kTiles * kTileStride];
    alignas(64) float totals[kMost * M::kTiles * kTile];
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < panels * chunks; ++task) {
      const int64_t first = task % chunks * kMost, count = std::min<int64_t>(kMost, a.m - first);
      const int64_t tile = task / chunks * M::kTiles, tiles = std::min<int64_t>(M::kTiles, all_tiles - tile);
      std::fill_n(totals, count * M::kTiles * kTile, 0.0f);
      for (int64_t s = 0; s < spans; ++s) {
        const int64_t at = s * a.span, span = std::min(a.span, a.blocks - at);
        Float scales[M::kTiles * kVectors];
        for (int64_t t = 0; t < tiles; ++t) {
          const int64_t own = ((tile + t) * spans + s) * kTile;
          for (int v = 0; v < kVectors; ++v) scales[t * kVectors + v] = load(a.scales + own + v * kLanes);
          widen<Bits>(a.codes + ((tile + t) * a.blocks + at) * Bits * kTile, span * Bits, a.zeros + own,
                      wide + t * kTileStride);
        }
        multiplier.panel(x + first * stride + at * kUnits, stride, count, wide, kTileStride, span * kUnits, tiles,
                         scales, totals);
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

template <typename P>
void by_bits(const Quantized& a, const typename P::X* x) {
  switch (a.bits) {
    case 2: return product<P, 2>(a, x);
    case 4: return product<P, 4>(a, x);
    case 8: return product<P, 8>(a, x);
  }
}

// Rows of x as the steps read them: columns where the weight has them, zero where it has none.
template <typename T>
void quantized_of(const Quantized& a) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t places = a.blocks * kBlock;
  constexpr bool kStored = kPairs && std::is_same_v<T, bf16>;
  using P = std::conditional_t<kStored, Pairs, Wide<T>>;
  using E = std::conditional_t<kStored, T, float>;
  if constexpr (std::is_same_v<E, T>) {
    if (!a.columns && places == a.k) return by_bits<P>(a, reinterpret_cast<const typename P::X*>(x));
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
  by_bits<P>(a, reinterpret_cast<const typename P::X*>(rows.data()));
}

}  // namespace

void quantized(const Quantized& a) { FOLO_BY_DTYPE(a.dtype, quantized_of, a) }

}  // namespace folo::FOLO_ISA
