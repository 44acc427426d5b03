// Products of two rows, as attention takes them: what rows are turned into, and what they add to a sum.
#pragma once

#include "simd.h"

namespace folo::FOLO_ISA {

// [kLanes rows] of kLanes floats, transposed.
inline void transpose(Float (&x)[kLanes]) {
#ifdef __AVX512F__
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  __m512 u[16];
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    __m512 a = _mm512_shuffle_f32x4(u[i], u[i + 4], 0x88), b = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0x88);
    __m512 c = _mm512_shuffle_f32x4(u[i], u[i + 4], 0xDD), d = _mm512_shuffle_f32x4(u[i + 8], u[i + 12], 0xDD);
    x[i].v = _mm512_shuffle_f32x4(a, b, 0x88);
    x[i + 8].v = _mm512_shuffle_f32x4(a, b, 0xDD);
    x[i + 4].v = _mm512_shuffle_f32x4(c, d, 0x88);
    x[i + 12].v = _mm512_shuffle_f32x4(c, d, 0xDD);
  }
#else
  __m256 t[8], u[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(x[i].v, x[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(x[i].v, x[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xEE);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    x[i].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    x[i + 4].v = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
#endif
}

// How products of two rows go: what q, K and V are turned into, one Unit at a time, and what they add.
template <typename T>
struct Wide {  // in float32
  using Unit = float;
  static constexpr int kPer = 1;  // elements of a Unit
  using Weight = float;
  static Float unit(const T* x) { return load(x); }
  static Float unit(const T* x, int count) { return load(x, count); }
  static Float values(const T* a, int count) { return count == kLanes ? load(a) : load(a, count); }
  static Float step(Float sum, Float many, float one) { return fma(many, all(one), sum); }
  static void weights(float* to, Float low, Float high) {
    store(to, low);
    store(to + kLanes, high);
  }
};
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
struct Paired {  // bfloat16, two products at a time
  using Unit = uint32_t;
  static constexpr int kPer = 2;
  using Weight = bf16;
  static Float unit(const bf16* x) { return load(reinterpret_cast<const float*>(x)); }
  static Float unit(const bf16* x, int count) {
    __mmask16 mask = __mmask16((1u << count) - 1);
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(mask, x))};
  }
  // Two rows, element by element: 32 of them, as two vectors.
  static void values(const bf16* a, const bf16* b, float* out) {
    alignas(64) static const uint16_t kOrder[64] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    __m512i x = _mm512_loadu_si512(a), y = b ? _mm512_loadu_si512(b) : _mm512_setzero_si512();
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(x, _mm512_load_si512(kOrder), y));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(x, _mm512_load_si512(kOrder + 32), y));
  }
  static Float values(const bf16* a, const bf16* b, int count) {
    __mmask16 mask = __mmask16((1u << count) - 1);
    __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, a));
    __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(b ? mask : __mmask16(0), b));
    return {_mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)))};
  }
  static Float step(Float sum, Float many, uint32_t one) {
    __m512i ones = _mm512_set1_epi32(int(one));
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_castps_si512(many.v)),
                             reinterpret_cast<__m512bh>(ones))};
  }
  static void weights(bf16* to, Float low, Float high) {  // to nearest even, as every bfloat16 product here
    _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
  }
};
#endif
template <typename T>
struct Arithmetic : Wide<T> {};
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
template <>
struct Arithmetic<bf16> : Paired {};
#endif

// out[r][c] = the sum over `depth` units of rows[r][...] times columns[...][c], for C vectors of columns.
template <typename A, int R, int C>
inline void row_block(const typename A::Unit* rows, int64_t row_stride, const float* columns,
                      int64_t column_stride, int64_t depth, float* out, int64_t out_stride) {
  Float sums[R][C];
  for (auto& sum : sums)
    for (auto& s : sum) s = zero();
  for (int64_t k = 0; k < depth; ++k) {
    for (int c = 0; c < C; ++c) {
      Float many = load(columns + k * column_stride + c * kLanes);
      for (int r = 0; r < R; ++r) sums[r][c] = A::step(sums[r][c], many, rows[r * row_stride + k]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * out_stride + c * kLanes, sums[r][c]);
}

}  // namespace folo::FOLO_ISA
