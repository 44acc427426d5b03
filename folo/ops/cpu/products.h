// Products of two rows, as attention takes them: of what lies in units of 4 bytes, each one element or two.
#pragma once

#include "tiles.h"

namespace folo::FOLO_ISA {

// How a query, or a row of weights, is multiplied with K or V.
template <typename T>
struct Arithmetic : Split<T> {
  static constexpr int kPer = 2;  // elements of a unit
};
template <>
struct Arithmetic<float> : Singles<float> {
  static constexpr int kPer = 1;
};
template <>
struct Arithmetic<bf16> : Pairs {
  static constexpr int kPer = 2;
};

// Two vectors of elements of a row.
inline void store_pair(float* to, Float low, Float high) {
  store(to, low);
  store(to + kLanes, high);
}
#if defined(FOLO_AVX512_BF16) || defined(FOLO_AMX)
inline void store_pair(bf16* to, Float low, Float high) {  // to nearest even, as every bfloat16 product here
  _mm512_storeu_si512(to, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)));
}
#endif

// out[r][c] = the sum over `depth` units of rows[r][...] times *columns(..., c), for C vectors of columns.
template <typename A, int R, int C, typename Columns>
inline void row_block(const typename A::X* rows, int64_t row_stride, int64_t depth, float* out, int64_t out_stride,
                      Columns columns) {
  Float sums[R][C];
  for (auto& sum : sums)
    for (auto& s : sum) s = zero();
  for (int64_t u = 0; u < depth; ++u) {
    for (int c = 0; c < C; ++c) {
      const auto many = A::columns(reinterpret_cast<const typename A::W*>(columns(u, c)));
      for (int r = 0; r < R; ++r) sums[r][c] = A::step(sums[r][c], many, A::row(rows + r * row_stride + u));
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) store(out + r * out_stride + c * kLanes, sums[r][c]);
}

}  // namespace folo::FOLO_ISA
