// What the row-wise sources share.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

#define FOLO_BY_DTYPE(dtype, function, argument)            \
  switch (dtype) {                                          \
    case Dtype::kFloat32: return function<float>(argument); \
    case Dtype::kBFloat16: return function<bf16>(argument); \
    case Dtype::kFloat16: return function<fp16>(argument);  \
  }

namespace folo::FOLO_ISA {

// Whether m rows of n elements are worth waking the other threads for.
inline bool many(int64_t m, int64_t n) { return m > 1 && m * n >= (1 << 14); }

// 1 / sqrt(mean(x * x) + eps)
template <typename T>
inline float rms_scale(const T* x, int64_t d, float eps) {
  Float squares = zero();
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    Float value = load(x + i);
    squares = fma(value, value, squares);
  }
  if (i < d) {
    Float value = load(x + i, int(d - i));
    squares = fma(value, value, squares);
  }
  return 1 / std::sqrt(sum(squares) / float(d) + eps);
}

inline Float silu(Float x) { return x / (all(1.0f) + exp(zero() - x)); }

// n elements of silu(gate) * up
template <typename T>
inline void silu_mul_row(const T* gate, const T* up, T* out, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, silu(load(gate + i)) * load(up + i));
  if (const int rest = int(n - i)) store(out + i, silu(load(gate + i, rest)) * load(up + i, rest), rest);
}

}  // namespace folo::FOLO_ISA
