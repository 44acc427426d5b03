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

}  // namespace folo::FOLO_ISA
