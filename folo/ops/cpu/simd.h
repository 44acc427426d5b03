// Vectors of float for the instruction set that a source is compiled for, and the storage types.
//
// The same source is compiled once for each of FOLO_AVX2, FOLO_AVX512, FOLO_AVX512_BF16 and FOLO_AMX, into
// a namespace of that name. Every loop is written so that a row's arithmetic does not depend on where the
// row stands: a lane's place in a vector is its element's place in the row, modulo kLanes.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(FOLO_AMX)
#define FOLO_ISA amx
#elif defined(FOLO_AVX512_BF16)
#define FOLO_ISA avx512_bf16
#elif defined(FOLO_AVX512)
#define FOLO_ISA avx512
#else
#define FOLO_ISA avx2
#endif

namespace folo {

inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(fp16 x) { return _cvtsh_ss(x.bits); }
inline float widen(float x) { return x; }

namespace FOLO_ISA {

#ifdef __AVX512F__

constexpr int kLanes = 16;
struct Float {
  __m512 v;
};
using Half = __m256i;  // kLanes 16-bit values

inline Float zero() { return {_mm512_setzero_ps()}; }
inline Float all(float x) { return {_mm512_set1_ps(x)}; }
inline Float load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Float a) { _mm512_storeu_ps(p, a.v); }
inline Half load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_half(void* p, Half a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a); }
inline Float operator+(Float a, Float b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Float operator-(Float a, Float b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Float operator*(Float a, Float b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Float operator/(Float a, Float b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Float fma(Float a, Float b, Float c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// If either is NaN: b.
inline Float max(Float a, Float b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Float min(Float a, Float b) { return {_mm512_min_ps(a.v, b.v)}; }
// A bit for each lane, the first the lowest; 0 if either is NaN.
inline unsigned at_least(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ); }
inline unsigned greater(Float a, Float b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline bool has_nan(Float a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q) != 0; }
inline Float round(Float a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// a * 2^n for whole n in [-252, 252], right down to denormals
inline Float scale2(Float a, Float n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline Float widen(Half a, bf16) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16))};
}
inline Float widen(Half a, fp16) { return {_mm512_cvtph_ps(a)}; }
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
inline Half narrow(Float a, bf16) {  // to nearest, ties to even; NaN stays NaN; denormals become 0
  return reinterpret_cast<Half>(_mm512_cvtneps_pbh(a.v));
}
#else
inline Half narrow(Float a, bf16) {  // to nearest, ties to even; NaN stays NaN
  __m512i bits = _mm512_castps_si512(a.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC00000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif
inline Half narrow(Float a, fp16) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

#else

constexpr int kLanes = 8;
struct Float {
  __m256 v;
};
using Half = __m128i;

inline Float zero() { return {_mm256_setzero_ps()}; }
inline Float all(float x) { return {_mm256_set1_ps(x)}; }
inline Float load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, Float a) { _mm256_storeu_ps(p, a.v); }
inline Half load_half(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline void store_half(void* p, Half a) { _mm_storeu_si128(static_cast<__m128i*>(p), a); }
inline Float operator+(Float a, Float b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Float operator-(Float a, Float b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Float operator*(Float a, Float b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Float operator/(Float a, Float b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Float fma(Float a, Float b, Float c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Float max(Float a, Float b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Float min(Float a, Float b) { return {_mm256_min_ps(a.v, b.v)}; }
inline unsigned at_least(Float a, Float b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)));
}
inline unsigned greater(Float a, Float b) {
  return unsigned(_mm256_movemask_ps(_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)));
}
inline bool has_nan(Float a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)) != 0; }
inline Float round(Float a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Float power2(__m256i n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23))};
}
inline Float scale2(Float a, Float n) {  // in two factors, each a normal number
  __m256i whole = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(whole, 1);
  return a * power2(half) * power2(_mm256_sub_epi32(whole, half));
}
inline Float widen(Half a, bf16) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16))};
}
inline Float widen(Half a, fp16) { return {_mm256_cvtph_ps(a)}; }
inline Half narrow(Float a, bf16) {
  __m256i bits = _mm256_castps_si256(a.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), nan);
  __m256i packed = _mm256_packus_epi32(_mm256_srli_epi32(rounded, 16), _mm256_setzero_si256());
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
}
inline Half narrow(Float a, fp16) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT); }

#endif

inline Float load(const bf16* p) { return widen(load_half(p), bf16{}); }
inline Float load(const fp16* p) { return widen(load_half(p), fp16{}); }
inline void store(bf16* p, Float a) { store_half(p, narrow(a, bf16{})); }
inline void store(fp16* p, Float a) { store_half(p, narrow(a, fp16{})); }

// The first n < kLanes elements; the other lanes are `rest`.
template <typename T>
inline Float load(const T* p, int n, float rest = 0) {
  alignas(64) float whole[kLanes];
  for (int i = 0; i < kLanes; ++i) whole[i] = i < n ? folo::widen(p[i]) : rest;
  return load(whole);
}
template <typename T>
inline void store(T* p, Float a, int n) {
  alignas(64) T whole[kLanes];
  store(whole, a);
  for (int i = 0; i < n; ++i) p[i] = whole[i];
}

// Lanes by pairwise halving: one order.
template <typename Two>
inline float halved(Float a, Two two) {
#ifdef __AVX512F__
  __m256 half = two(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
#else
  __m256 half = a.v;
#endif
  __m256 four = two(half, _mm256_permute2f128_ps(half, half, 1));
  __m256 pair = two(four, _mm256_permute_ps(four, 0b01001110));
  return _mm256_cvtss_f32(two(pair, _mm256_permute_ps(pair, 0b10110001)));
}
inline float sum(Float a) {
  return halved(a, [](__m256 x, __m256 y) { return _mm256_add_ps(x, y); });
}
inline float largest(Float a) {
  return halved(a, [](__m256 x, __m256 y) { return _mm256_max_ps(x, y); });
}

// e^x within an ulp or two: Cephes' expf (Moshier). 0 below -104, as at 88 above 88; NaN stays NaN.
inline Float exp(Float x) {
  x = min(all(88.0f), max(all(-104.0f), x));  // e^-104 rounds to 0
  Float n = round(x * all(1.44269504088896341f));
  Float r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Float p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  return scale2(fma(p, r * r, r) + all(1.0f), n);
}

// 2^x within an ulp or two: Cephes' exp2f (Moshier), for x up to 0. 0 below -150; NaN stays NaN.
inline Float exp2(Float x) {
  x = max(all(-160.0f), x);
  Float n = round(x), f = x - n;
  Float p = all(1.535336188319500e-4f);
  p = fma(p, f, all(1.339887440266574e-3f));
  p = fma(p, f, all(9.618437357674640e-3f));
  p = fma(p, f, all(5.550332471162809e-2f));
  p = fma(p, f, all(2.402264791363012e-1f));
  p = fma(p, f, all(6.931472028550421e-1f));
  return scale2(fma(p, f, all(1.0f)), n);
}

}  // namespace FOLO_ISA
}  // namespace folo
