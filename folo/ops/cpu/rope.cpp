// Norms of each head of q and k where the model has them, rotation (half-split layout), and k and v to their
// slots: one pass over each token.
#include <omp.h>

#include <vector>

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace folo::FOLO_ISA {
namespace {

template <typename T>
void rotate(const T* x, const T* weight, const float* angles, int64_t d, float eps, T* out) {
  const int64_t half = d / 2;
  const Float scale = all(weight ? rms_scale(x, d, eps) : 1.0f);
  // What a norm gives is rounded to T, as if it were an op of its own.
  auto normed = [&](int64_t i, int count) {
    Float value = count == kLanes ? load(x + i) : load(x + i, count);
    if (!weight) return value;
    value = value * scale * (count == kLanes ? load(weight + i) : load(weight + i, count));
    T rounded[kLanes];
    store(rounded, value);
    return load(rounded);
  };
  for (int64_t i = 0; i < half; i += kLanes) {
    int count = half - i < kLanes ? int(half - i) : kLanes;
    Float first = normed(i, count), second = normed(half + i, count);
    Float cos = count == kLanes ? load(angles + i) : load(angles + i, count);
    Float sin = count == kLanes ? load(angles + half + i) : load(angles + half + i, count);
    Float a = first * cos - second * sin, b = second * cos + first * sin;
    if (count == kLanes) {
      store(out + i, a);
      store(out + half + i, b);
    } else {
      store(out + i, a, count);
      store(out + half + i, b, count);
    }
  }
}

template <typename T>
void rope_of(const Rope& a) {
  constexpr int64_t kPer = 4 / int64_t(sizeof(T));
  const int64_t d = a.head_dim, kv = a.num_kv_heads * d, width = a.num_heads * d + 2 * kv;
  std::vector<T> rows(size_t(d * omp_get_max_threads()));
#pragma omp parallel for schedule(static) if (many(a.t, width))
  for (int64_t token = 0; token < a.t; ++token) {
    const T* from = static_cast<const T*>(a.qkv) + token * width;
    const float* angles = a.angles + token * d;
    T* q = static_cast<T*>(a.q) + token * a.num_heads * d;
    for (int64_t h = 0; h < a.num_heads; ++h)
      rotate(from + h * d, static_cast<const T*>(a.q_norm), angles, d, a.eps, q + h * d);
    if (a.slots[token] < 0) continue;
    const T* k = from + a.num_heads * d;
    const int64_t block = a.slots[token] / a.block_size, offset = a.slots[token] % a.block_size;
    T* row = rows.data() + omp_get_thread_num() * d;
    T* k_to = reinterpret_cast<T*>(a.k_cache + block * a.strides.k_block) + offset * kPer;
    T* v_to = reinterpret_cast<T*>(a.v_cache + block * a.strides.v_block + offset / kPer * d) + offset % kPer;
    for (int64_t h = 0; h < a.num_kv_heads; ++h) {
      rotate(k + h * d, static_cast<const T*>(a.k_norm), angles, d, a.eps, row);
      for (int64_t i = 0; i < d; i += kPer) std::memcpy(k_to + i * a.block_size, row + i, kPer * sizeof(T));
      for (int64_t i = 0; i < d; ++i) v_to[i * kPer] = k[kv + h * d + i];
      k_to += a.strides.k_head * kPer;
      v_to += a.strides.v_head * kPer;
    }
  }
}

}  // namespace

void rope(const Rope& a) { FOLO_BY_DTYPE(a.dtype, rope_of, a); }

}  // namespace folo::FOLO_ISA
