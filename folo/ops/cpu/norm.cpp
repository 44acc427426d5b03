// RMSNorm with the residual's addition before it, and SiLU times up: one pass over each row.
#include <cmath>

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace folo::FOLO_ISA {
namespace {

template <typename T>
void norm_of(const Norm& a) {
  const int64_t whole = a.d / kLanes * kLanes;
  const int rest = int(a.d - whole);
  const T* weight = static_cast<const T*>(a.weight);
#pragma omp parallel for schedule(static) if (many(a.m, a.d))
  for (int64_t row = 0; row < a.m; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.d;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.d;
      T* total = static_cast<T*>(a.total) + row * a.d;
      for (int64_t i = 0; i < whole; i += kLanes) store(total + i, load(x + i) + load(residual + i));
      if (rest) store(total + whole, load(x + whole, rest) + load(residual + whole, rest), rest);
      x = total;  // what is normalised is what was rounded: the next layer adds to that
    }
    T* out = static_cast<T*>(a.out) + row * a.d;
    float scale = rms_scale(x, a.d, a.eps);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(x + i) * all(scale) * load(weight + i));
    if (rest) store(out + whole, load(x + whole, rest) * all(scale) * load(weight + whole, rest), rest);
  }
}

template <typename T>
void silu_mul_of(const SiluMul& a) {
#pragma omp parallel for schedule(static) if (many(a.m, a.n))
  for (int64_t row = 0; row < a.m; ++row) {
    const T* gate = static_cast<const T*>(a.gate_up) + row * 2 * a.n;
    silu_mul_row(gate, gate + a.n, static_cast<T*>(a.out) + row * a.n, a.n);
  }
}

}  // namespace

void norm(const Norm& a) { FOLO_BY_DTYPE(a.dtype, norm_of, a); }
void silu_mul(const SiluMul& a) { FOLO_BY_DTYPE(a.dtype, silu_mul_of, a); }

}  // namespace folo::FOLO_ISA
