// Rows of x times tiles of 16 columns: what the sources of linear layers share.
#pragma once

#include <cstring>

#include "simd.h"

namespace folo::FOLO_ISA {

constexpr int kTile = 16;

// How one step over k goes: what a row and a vector of columns give to it, and what it adds.
template <typename Stored>
struct Singles {
  using T = Stored;
  using X = float;
  using W = Stored;
  static Float columns(const W* w) { return load(w); }
  static Float row(const X* x) { return all(*x); }
  static Float step(Float sum, Float w, Float x) { return fma(w, x, sum); }
};
// A pair of 16-bit elements at a time: one product after the other, in float32.
template <typename Stored>
struct Split {
  struct Both {
    Float even, odd;
  };
  using T = Stored;
  struct X {
    float even, odd;
  };
  using W = uint32_t;
  static Both columns(const W* w) { return split(w, Stored{}); }
  static Both row(const X* x) { return {all(x->even), all(x->odd)}; }
  static Float step(Float sum, Both w, Both x) { return fma(w.odd, x.odd, fma(w.even, x.even, sum)); }

 private:
#ifdef __AVX512F__
  static Both split(const W* w, bf16) {
    __m512i pairs = _mm512_loadu_si512(w), high = _mm512_set1_epi32(int(0xFFFF0000));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(pairs, high))}};
  }
  static Both split(const W* w, fp16) {
    __m512i pairs = _mm512_loadu_si512(w);
    return {widen(_mm512_cvtepi32_epi16(pairs), fp16{}),
            widen(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)), fp16{})};
  }
#else
  static Both split(const W* w, bf16) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    __m256i high = _mm256_set1_epi32(int(0xFFFF0000));
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(pairs, high))}};
  }
  static Both split(const W* w, fp16) {
    __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    __m256i low = _mm256_and_si256(pairs, _mm256_set1_epi32(0xFFFF)), high = _mm256_srli_epi32(pairs, 16);
    __m256i parted = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0b11011000);
    return {widen(_mm256_castsi256_si128(parted), fp16{}), widen(_mm256_extracti128_si256(parted, 1), fp16{})};
  }
#endif
};

#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
struct Pairs {
  using T = bf16;
  using X = uint32_t;
  using W = uint32_t;
  static __m512i columns(const W* w) { return _mm512_loadu_si512(w); }
  static __m512i row(const X* x) {
    int pair;  // a caller's x is aligned to its elements, not to pairs of them
    std::memcpy(&pair, x, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Float step(Float sum, __m512i w, __m512i x) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x))};
  }
};
#else
using Pairs = Split<bf16>;
#endif

constexpr int kVectors = kTile / kLanes;        // of a tile
constexpr int kWide = kLanes == 16 ? 4 : 1;     // tiles that a block of rows goes over at once
constexpr int kRows = 6;                        // rows of a block: kRows * kWide * kVectors sums in registers

// Sums of one row and the columns of a tile, of which there are `count`, to the output.
template <typename O, typename T>
void write(O* out, const Float* sums, const T* bias, int count) {
  for (int v = 0; v < kVectors; ++v, out += kLanes, bias += bias ? kLanes : 0, count -= kLanes) {
    if (count >= kLanes) {
      store(out, bias ? sums[v] + load(bias) : sums[v]);
    } else if (count > 0) {
      store(out, bias ? sums[v] + load(bias, count) : sums[v], count);
    }
  }
}

// To element `at` of outputs in T, or in fp32 where they are wide.
template <typename T>
void write(void* out, bool wide, int64_t at, const Float* sums, const T* bias, int count) {
  if (wide) {
    write(static_cast<float*>(out) + at, sums, bias, count);
  } else {
    write(static_cast<T*>(out) + at, sums, bias, count);
  }
}

}  // namespace folo::FOLO_ISA
