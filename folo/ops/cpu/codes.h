// Codes of 2, 4 or 8 bits as folo/ops/quantized.py packs them, turned into what products take: code - zero.
#pragma once

#include "simd.h"
#include "tiles.h"

namespace folo::FOLO_ISA {

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

}  // namespace folo::FOLO_ISA
