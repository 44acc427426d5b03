// Where K and V of a span of keys lie: in the heap, or in copies where products could not read them there.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "plan.h"
#include "scratch.h"

namespace folo::FOLO_ISA {

constexpr int kGroup = 16;  // keys that are read side by side

// To whole vectors and tiles.
inline int64_t padded(int64_t x) { return (x + 15) / 16 * 16; }

// `Per` elements are a unit of 4 bytes; kernels.h says how units lie.
template <int Per>
class Places {
 public:
  // depth: units of a key that products read, at least head_dim / Per.
  Places(const Attention& a, int64_t depth)
      : keys_direct(a.block_size % kGroup == 0 && depth * Per == a.head_dim),
        values_direct(a.block_size % Per == 0 && padded(a.head_dim) == a.head_dim),
        key_stride(keys_direct ? a.block_size : kGroup),
        a_(a),
        depth_(depth),
        width_(padded(a.head_dim)) {}

  const bool keys_direct, values_direct;  // read in the heap
  const int64_t key_stride;               // from a unit of a group of keys to their next one

  const uint32_t* keys[kKeys / kGroup];  // of a group
  const uint32_t* values[kKeys / Per];   // of Per keys

  void take(Scratch& scratch) {
    last_ = scratch.take<uint32_t>(width_);
    if (!keys_direct) key_copies_ = scratch.take<uint32_t>(kKeys * depth_);
    if (!values_direct) value_copies_ = scratch.take<uint32_t>(kKeys / Per * width_);
  }

  // Nothing is read, unless it has to be copied.
  void find(const Span& span, int64_t head) {
    const auto& strides = a_.strides;
    in_pieces(span, [&](int64_t j, int64_t block, int64_t slot, int64_t run) {
      const uint32_t* k = a_.k_cache + block * strides.k_block + head * strides.k_head + slot;
      for (int64_t i = 0; keys_direct && i < run; i += kGroup) keys[(j + i) / kGroup] = k + i;
      const uint32_t* v = a_.v_cache + block * strides.v_block + head * strides.v_head + slot / Per * a_.head_dim;
      for (int64_t i = 0; values_direct && i < run; i += Per) values[(j + i) / Per] = v + i / Per * a_.head_dim;
    });
    if (!keys_direct) copy_keys(span, head);
    if (!values_direct) copy_values(span, head);
  }

  // The first `count` values alone: half of the last unit may be a key's that nobody sees, and anything.
  void end_values(int64_t count) {
    if (count % Per == 0 || !values_direct) return;
    const uint32_t* from = values[count / Per];
    for (int64_t i = 0; i < width_; ++i) last_[i] = from[i] & 0xFFFF;
    values[count / Per] = last_;
  }

 private:
  // f(key of the span, block, slot, run) for its first key and each with which a block begins; run: the keys from
  // there that are in the block.
  template <typename F>
  void in_pieces(const Span& span, F&& f) const {
    const int64_t start = span.number * kKeys;
    const int32_t* table = a_.block_tables + span.sequence * a_.table_width + start / a_.block_size;
    for (int64_t j = 0, slot = start % a_.block_size, run; j < span.count; j += run, slot = 0, ++table) {
      run = std::min(span.count - j, a_.block_size - slot);
      f(j, *table, slot, run);
    }
  }

  void copy_keys(const Span& span, int64_t head) {
    std::fill_n(key_copies_, kKeys * depth_, 0);
    in_pieces(span, [&](int64_t j, int64_t block, int64_t slot, int64_t run) {
      const uint32_t* k = a_.k_cache + block * a_.strides.k_block + head * a_.strides.k_head + slot;
      for (int64_t u = 0; u < a_.head_dim / Per; ++u, k += a_.block_size)
        for (int64_t i = 0; i < run; ++i)
          key_copies_[((j + i) / kGroup * depth_ + u) * kGroup + (j + i) % kGroup] = k[i];
    });
    for (int g = 0; g < kKeys / kGroup; ++g) keys[g] = key_copies_ + g * depth_ * kGroup;
  }

  void copy_values(const Span& span, int64_t head) {
    using Element = std::conditional_t<Per == 2, uint16_t, uint32_t>;
    std::fill_n(value_copies_, kKeys / Per * width_, 0);
    auto* to = reinterpret_cast<Element*>(value_copies_);
    in_pieces(span, [&](int64_t j, int64_t block, int64_t slot, int64_t run) {
      const auto* v = reinterpret_cast<const Element*>(a_.v_cache + block * a_.strides.v_block +
                                                       head * a_.strides.v_head);
      for (int64_t i = 0; i < run; ++i)
        for (int64_t e = 0; e < a_.head_dim; ++e)
          to[((j + i) / Per * width_ + e) * Per + (j + i) % Per] =
              v[((slot + i) / Per * a_.head_dim + e) * Per + (slot + i) % Per];
    });
    for (int u = 0; u < kKeys / Per; ++u) values[u] = value_copies_ + u * width_;
  }

  const Attention& a_;
  const int64_t depth_, width_;
  uint32_t *key_copies_ = nullptr, *value_copies_ = nullptr, *last_ = nullptr;
};

}  // namespace folo::FOLO_ISA
