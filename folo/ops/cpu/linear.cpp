// x [m, k] times a packed weight: every output is one sum over k in order, in fp32, for every m.
//
// The weight's columns stand in tiles of 16, zero beyond n: [n / 16][k][16] in float32 and float16, and in
// bfloat16 [n / 16][k / 2][16][2], with k a multiple of 32, zero beyond the weight's own: the layout that
// AMX and vdpbf16ps take, and that the others split into its even and its odd elements.
#include <omp.h>

#include <algorithm>
#include <vector>

#include "kernels.h"
#include "simd.h"
#ifdef FOLO_AMX
#include "amx.h"
#endif

namespace folo::FOLO_ISA {
namespace {

constexpr int kTile = 16;

// How one step over k goes: what a row and a vector of columns give to it, and what it adds.
template <typename Stored>
struct Singles {
  using T = Stored;
  using X = float;
  using W = Stored;
  static Float columns(const W* w) { return load(w); }
  static Float row(X x) { return all(x); }
  static Float step(Float sum, Float w, Float x) { return fma(w, x, sum); }
};
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
struct Pairs {
  using T = bf16;
  using X = uint32_t;
  using W = uint32_t;
  static __m512i columns(const W* w) { return _mm512_loadu_si512(w); }
  static __m512i row(X x) { return _mm512_set1_epi32(int(x)); }
  static Float step(Float sum, __m512i w, __m512i x) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }
};
#else
struct Pairs {
  struct Both {
    Float even, odd;
  };
  using T = bf16;
  struct X {
    float even, odd;
  };
  using W = uint32_t;
  static Both columns(const W* w) {
#ifdef __AVX512F__
    __m512i pairs = _mm512_loadu_si512(w), high = _mm512_set1_epi32(int(0xFFFF0000));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(pairs, high))}};
#else
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    __m256i high = _mm256_set1_epi32(int(0xFFFF0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(pairs, high))}};
#endif
  }
  static Both row(X x) { return {all(x.even), all(x.odd)}; }
  static Float step(Float sum, Both w, Both x) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }
};
#endif

constexpr int kVectors = kTile / kLanes;        // of a tile
constexpr int kWide = kLanes == 16 ? 4 : 1;     // tiles that a block of rows goes over at once
constexpr int kRows = 6;                        // rows of a block: kRows * kWide * kVectors sums in registers
constexpr int64_t kChunkBytes = 256 << 10;      // of x that a thread goes over tile by tile

template <typename T>
void write(T* out, const Float* sums, const T* bias, int count) {
  for (int v = 0; v < kVectors; ++v, out += kLanes, bias += bias ? kLanes : 0, count -= kLanes) {
    if (count >= kLanes) {
      store(out, bias ? sums[v] + load(bias) : sums[v]);
    } else if (count > 0) {
      store(out, bias ? sums[v] + load(bias, count) : sums[v], count);
    }
  }
}

// The weights that a thread needs next, fetched into its second cache while it multiplies the present ones.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  void fetch() {
    if (at < end) {
      _mm_prefetch(at, _MM_HINT_T1);
      at += 64;
    }
  }
};

// R rows times C tiles.
template <typename P, int R, int C>
void block(const Linear& a, const typename P::X* x, int64_t depth, int64_t row, int64_t tile, Ahead& ahead) {
  using T = typename P::T;
  constexpr int V = C * kVectors;
  const auto* w = static_cast<const typename P::W*>(a.weight) + tile * depth * kTile;
  Float sums[R][V];
  for (auto& sum : sums)
    for (auto& s : sum) s = zero();
  const typename P::X* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x + (row + r) * depth;
  for (int64_t k = 0; k < depth; ++k) {
    ahead.fetch();
    decltype(P::columns(w)) columns[V];
    for (int v = 0; v < V; ++v)
      columns[v] = P::columns(w + ((v / kVectors) * depth + k) * kTile + (v % kVectors) * kLanes);
    for (int r = 0; r < R; ++r) {
      auto x = P::row(rows[r][k]);
      for (int v = 0; v < V; ++v) sums[r][v] = P::step(sums[r][v], columns[v], x);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int c = 0; c < C; ++c) {
      int64_t column = (tile + c) * kTile;
      const T* bias = a.bias ? static_cast<const T*>(a.bias) + column : nullptr;
      T* out = static_cast<T*>(a.out) + (row + r) * a.n + column;
      write(out, sums[r] + c * kVectors, bias, int(std::min<int64_t>(kTile, a.n - column)));
    }
  }
}

template <typename P, int C>
void rows(const Linear& a, const typename P::X* x, int64_t depth, int64_t first, int64_t end, int64_t tile,
          Ahead ahead = {}) {
  for (; first + kRows <= end; first += kRows) block<P, kRows, C>(a, x, depth, first, tile, ahead);
  switch (end - first) {
    case 5: return block<P, 5, C>(a, x, depth, first, tile, ahead);
    case 4: return block<P, 4, C>(a, x, depth, first, tile, ahead);
    case 3: return block<P, 3, C>(a, x, depth, first, tile, ahead);
    case 2: return block<P, 2, C>(a, x, depth, first, tile, ahead);
    case 1: return block<P, 1, C>(a, x, depth, first, tile, ahead);
  }
}

// Chunks of rows times panels of kWide tiles, dealt to threads in order: neighbours share a panel.
template <typename P>
void product(const Linear& a, const typename P::X* x, int64_t depth) {
  int64_t tiles = (a.n + kTile - 1) / kTile, panels = (tiles + kWide - 1) / kWide;
  int64_t fit = kChunkBytes / int64_t(depth * sizeof(*x)) / kRows * kRows;
  int64_t height = std::clamp<int64_t>(fit, kRows, 96), chunks = (a.m + height - 1) / height;
#pragma omp parallel for schedule(static)
  for (int64_t task = 0; task < panels * chunks; ++task) {
    int64_t first = task % chunks * height, end = std::min(a.m, first + height);
    int64_t tile = task / chunks * kWide, last = std::min(tiles, tile + kWide);
    if (last - tile == kWide) {
      Ahead ahead;
      if (chunks == 1 && a.m > kRows && last < tiles) {
        ahead.at = reinterpret_cast<const char*>(static_cast<const typename P::W*>(a.weight) + last * depth * kTile);
        ahead.end = ahead.at + (std::min(tiles, last + kWide) - last) * depth * kTile * int64_t(sizeof(typename P::W));
      }
      rows<P, kWide>(a, x, depth, first, end, tile, ahead);
    } else {
      for (; tile < last; ++tile) rows<P, 1>(a, x, depth, first, end, tile);
    }
  }
}

#ifdef FOLO_AMX

// Up to 32 rows times up to 32 columns.
void tile_block(amx::Registers& registers, const Linear& a, const uint32_t* x, int64_t depth, int64_t row, int count,
                int64_t tile, int tiles) {
  const auto* left = static_cast<const uint32_t*>(a.weight) + tile * depth * kTile;
  alignas(64) float sums[2 * amx::kTileRows][2 * kTile];
  amx::block_of(registers, count, x + row * depth, depth, left, tiles > 1 ? left + depth * kTile : nullptr, kTile,
                depth, sums[0], 2 * kTile);
  for (int r = 0; r < count; ++r) {
    for (int c = 0; c < tiles; ++c) {
      const int64_t column = (tile + c) * kTile;
      const Float sum = load(&sums[r][c * kTile]);
      const bf16* bias = a.bias ? static_cast<const bf16*>(a.bias) + column : nullptr;
      bf16* out = static_cast<bf16*>(a.out) + (row + r) * a.n + column;
      write(out, &sum, bias, int(std::min<int64_t>(kTile, a.n - column)));
    }
  }
}

template <>
void product<Pairs>(const Linear& a, const uint32_t* x, int64_t depth) {
  constexpr int64_t kHigh = 2 * amx::kTileRows;
  const int64_t tiles = (a.n + kTile - 1) / kTile, panels = (tiles + 1) / 2;
  const int64_t fit = kChunkBytes / (depth * 4) / kHigh * kHigh;
  const int64_t height = std::clamp<int64_t>(fit, kHigh, 4 * kHigh), chunks = (a.m + height - 1) / height;
#pragma omp parallel
  {
    amx::Registers registers;
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < panels * chunks; ++task) {
      const int64_t first = task % chunks * height, end = std::min(a.m, first + height), tile = task / chunks * 2;
      for (int64_t row = first; row < end; row += kHigh)
        tile_block(registers, a, x, depth, row, int(std::min(kHigh, end - row)), tile, tile + 1 < tiles ? 2 : 1);
    }
  }
}

#endif

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
