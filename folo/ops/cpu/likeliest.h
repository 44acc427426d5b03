// The likeliest tokens of a row of logits, found by a look at each part's largest.
#pragma once

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"

namespace folo::FOLO_ISA {

constexpr float kBanned = -std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kPart = 256;        // logits whose sum or maximum is taken before they are looked at one by one
constexpr size_t kListed = 4096;  // tokens that a list has room for

// The largest of a row; NaN if one of them is NaN.
inline float top_of(const float* x, int64_t v) {
  Float tops = all(kBanned);
  bool nan = false;
  for (int64_t i = 0; i < v; i += kLanes) {
    Float value = i + kLanes <= v ? load(x + i) : load(x + i, int(v - i), kBanned);
    tops = max(tops, value);
    nan |= has_nan(value);
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : largest(tops);
}

inline int64_t fixed_point(float weight) { return int64_t(weight * 0x1p40f); }

// exp(x - top) of up to kPart logits.
inline void weights_of(const float* x, int64_t count, float top, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, exp(load(x + i) - all(top)));
  if (i < count) store(out + i, exp(load(x + i, int(count - i), kBanned) - all(top)), int(count - i));
}

struct Token {
  float logit;
  int32_t id;
  int64_t weight;
};

// A thread's memory for the likeliest tokens of a row.
struct List {
  explicit List(int64_t v) : tops(size_t((v + kPart - 1) / kPart)), sorted(tops) { tokens.reserve(kListed); }

  std::vector<float> tops, sorted;  // the largest logit of each part
  std::vector<Token> tokens;
  float top;
  bool complete;  // whether no other token is finite and of a weight of min_p
};

// List the tokens that reach the n-th largest of the parts' tops, but for those of a weight below min_p: n tokens at
// least reach it, and not many more unless they stand together. False if there is no room for them, or no finite top.
inline bool list_tokens(const float* logits, int64_t v, float scale, float min_p, size_t n, List& list) {
  if (!(scale > 0 && scale <= kLargest)) return false;  // a part's top might not stay its top
  const size_t parts = list.tops.size();
  for (size_t part = 0; part < parts; ++part) {
    const int64_t at = int64_t(part) * kPart;
    list.tops[part] = top_of(logits + at, std::min<int64_t>(kPart, v - at)) / scale;
    if (!(list.tops[part] <= kLargest)) return false;
  }
  list.top = *std::max_element(list.tops.begin(), list.tops.end());
  if (list.top == kBanned) return false;
  list.sorted = list.tops;
  const auto nth = list.sorted.begin() + int64_t(n - 1);
  std::nth_element(list.sorted.begin(), nth, list.sorted.end(), std::greater<float>());
  const float bound = std::max(*nth, -kLargest);
  float least;
  weights_of(&bound, 1, list.top, &least);
  list.complete = *nth == kBanned || least < 0.99f * min_p;  // exp is right to an ulp or two only

  list.tokens.clear();
  for (size_t part = 0; part < parts; ++part) {
    if (list.tops[part] < bound) continue;
    const int64_t at = int64_t(part) * kPart, end = std::min(v, at + kPart);
    for (int64_t i = at; i < end; i += kLanes) {
      const Float x = (i + kLanes <= v ? load(logits + i) : load(logits + i, int(v - i), kBanned)) / all(scale);
      unsigned lanes = at_least(x, all(bound));
      if (!lanes) continue;
      if (list.tokens.size() + kLanes > kListed) return false;
      float values[kLanes], weights[kLanes];
      store(values, x);
      store(weights, exp(x - all(list.top)));
      for (; lanes; lanes &= lanes - 1) {
        const int lane = __builtin_ctz(lanes);
        if (weights[lane] < min_p) continue;
        list.tokens.push_back({values[lane], int32_t(i) + lane, fixed_point(weights[lane])});
      }
    }
  }
  return true;
}

}  // namespace folo::FOLO_ISA
