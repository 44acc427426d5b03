// The sampler's arithmetic, one row of logits after the other: what folo/ops/sampler.py describes.
//
// Cumulative weights are sums of integers there and here, so that they have one value in any order: a token's
// weight is exp(logit - largest logit) in fixed point with 40 bits. No row is ever sorted whole: where an order
// is asked for, the likeliest tokens are listed, as few as can be told without one. Only if the answer is not among
// them do all tokens go into buckets by their distance from the largest logit, and the bucket in which the answer
// lies is looked at closely.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels.h"
#include "likeliest.h"
#include "rows.h"
#include "simd.h"

namespace folo::FOLO_ISA {
namespace {

constexpr int64_t kNoToken = -1;
constexpr int kBuckets = 2048;  // that part the range in which weights are not zero
constexpr float kPerUnit = 64;  // buckets for each unit of logits

int64_t total_of(const float* weights, int64_t count) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += fixed_point(weights[i]);
  return total;
}

void scale_by(const float* x, int64_t count, float scale, float* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i) / all(scale));
  if (i < count) store(out + i, load(x + i, int(count - i)) / all(scale), int(count - i));
}

// The first token whose cumulative weight exceeds u times the total.
int64_t draw_row(const float* x, int64_t v, bool greedy, float u) {
  const float top = top_of(x, v);
  if (!std::isfinite(top)) return kNoToken;
  if (greedy) return std::find(x, x + v, top) - x;
  float weights[kPart];
  std::vector<int64_t> sums;
  sums.reserve(size_t(v / kPart + 1));
  int64_t total = 0;
  for (int64_t at = 0; at < v; at += kPart) {
    const int64_t count = std::min<int64_t>(kPart, v - at);
    weights_of(x + at, count, top, weights);
    sums.push_back(total_of(weights, count));
    total += sums.back();
  }
  // floor(u * total), exactly: u = m / 2^24, and m * total would not fit 64 bits.
  const int64_t m = int64_t(u * 0x1p24f);
  int64_t left = m * (total >> 24) + ((m * (total & 0xFFFFFF)) >> 24);
  size_t part = 0;
  while (left >= sums[part]) left -= sums[part++];
  const int64_t at = int64_t(part) * kPart, count = std::min<int64_t>(kPart, v - at);
  weights_of(x + at, count, top, weights);
  int64_t i = 0;
  while ((left -= fixed_point(weights[i])) >= 0) ++i;
  return at + i;
}

int bucket_of(float x, float top) { return int(std::min((top - x) * kPerUnit, float(kBuckets - 1))); }

// The k-th largest of a row.
float kth_of(const float* x, int64_t v, float top, int64_t k) {
  std::vector<int64_t> counts(kBuckets, 0);
  for (int64_t i = 0; i < v; ++i) ++counts[size_t(bucket_of(x[i], top))];
  int bucket = 0;
  while (k > counts[size_t(bucket)]) k -= counts[size_t(bucket++)];
  std::vector<float> inside;
  for (int64_t i = 0; i < v; ++i)
    if (bucket_of(x[i], top) == bucket) inside.push_back(x[i]);
  std::nth_element(inside.begin(), inside.begin() + (k - 1), inside.end(), std::greater<float>());
  return inside[size_t(k - 1)];
}

// Ban all but the shortest prefix, by value descending, then id ascending, whose probability reaches top_p.
void truncate_p(float* x, int64_t v, float top, float top_p) {
  std::vector<int64_t> masses(kBuckets, 0);
  std::vector<float> weights(static_cast<size_t>(v));
  for (int64_t at = 0; at < v; at += kPart)
    weights_of(x + at, std::min<int64_t>(kPart, v - at), top, weights.data() + at);
  int64_t total = 0;
  for (int64_t i = 0; i < v; ++i) {
    const int64_t weight = fixed_point(weights[size_t(i)]);
    masses[size_t(bucket_of(x[i], top))] += weight;
    total += weight;
  }
  const double wanted = double(top_p) * double(total);
  int64_t before = 0;
  int bucket = 0;
  while (bucket + 1 < kBuckets && double(before + masses[size_t(bucket)]) < wanted) before += masses[size_t(bucket++)];
  std::vector<int64_t> inside;
  for (int64_t i = 0; i < v; ++i) {
    const int own = bucket_of(x[i], top);
    if (own == bucket) inside.push_back(i);
    if (own > bucket) x[i] = kBanned;
  }
  std::sort(inside.begin(), inside.end(), [&](int64_t a, int64_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; });
  for (int64_t i : inside) {
    const int64_t weight = fixed_point(weights[size_t(i)]);
    if (double(before) >= wanted && before > 0) x[i] = kBanned;
    before += weight;
  }
}

// What `warp_row` does, if a list of the likeliest tokens suffices to tell; otherwise false.
bool warp_listed(const float* logits, int64_t v, float scale, float min_p, int64_t top_k, float top_p, List& list,
                 float* out) {
  const size_t parts = list.tops.size(), n = top_k > 0 ? std::min(size_t(top_k), parts) : parts - parts / 16;
  if (!list_tokens(logits, v, scale, min_p, n, list)) return false;
  auto& tokens = list.tokens;
  const bool complete = list.complete;
  if (!complete && (top_k > 0 ? tokens.size() < size_t(top_k) : min_p > 0 || !(top_p < 1))) return false;
  if (top_k > 0 && size_t(top_k) < tokens.size()) {
    const auto kth = tokens.begin() + (top_k - 1);
    std::nth_element(tokens.begin(), kth, tokens.end(), [](auto& a, auto& b) { return a.logit > b.logit; });
    const auto below = [floor = kth->logit](const Token& token) { return token.logit < floor; };
    tokens.erase(std::remove_if(kth, tokens.end(), below), tokens.end());
  }
  if (top_p < 1) {
    int64_t listed = 0, total = 0, before = 0;
    for (const Token& token : tokens) listed += token.weight;
    for (int64_t at = 0; at < v && !complete && top_k <= 0; at += kPart) {
      float values[kPart], weights[kPart];
      const int64_t count = std::min<int64_t>(kPart, v - at);
      scale_by(logits + at, count, scale, values);
      weights_of(values, count, list.top, weights);
      total += total_of(weights, count);
    }
    const double wanted = double(top_p) * double(std::max(total, listed));
    if (double(listed) < wanted) return false;
    const auto later = [](const Token& a, const Token& b) {
      return a.logit != b.logit ? a.logit < b.logit : a.id > b.id;
    };
    auto end = tokens.end();  // a heap, the first in order first; behind it those that are kept
    std::make_heap(tokens.begin(), end, later);
    while (end != tokens.begin() && (double(before) < wanted || before == 0)) {
      before += tokens[0].weight;
      std::pop_heap(tokens.begin(), end--, later);
    }
    tokens.erase(tokens.begin(), end);
  }
  std::fill(out, out + v, kBanned);
  for (const Token& token : tokens) out[token.id] = token.logit;
  return true;
}

void warp_row(const float* logits, int64_t v, float temperature, float min_p, int64_t top_k, float top_p, List& list,
              float* out) {
  const float scale = temperature == 0 ? 1.0f : temperature;
  if (top_k >= v) top_k = 0;
  const bool filters = v > 0 && !(min_p <= 0 && top_k <= 0 && top_p >= 1);
  if (filters && warp_listed(logits, v, scale, min_p, top_k, top_p, list, out)) return;
  scale_by(logits, v, scale, out);
  if (!filters) return;
  const float top = top_of(out, v);
  if (!std::isfinite(top)) return;  // `draw` refuses such a row
  if (min_p > 0) {
    float weights[kPart];
    for (int64_t at = 0; at < v; at += kPart) {
      const int64_t count = std::min<int64_t>(kPart, v - at);
      weights_of(out + at, count, top, weights);
      for (int64_t j = 0; j < count; ++j)
        if (weights[j] < min_p) out[at + j] = kBanned;
    }
  }
  if (top_k > 0) {
    const float least = kth_of(out, v, top, top_k);
    for (int64_t j = 0; j < v; ++j)
      if (out[j] < least) out[j] = kBanned;
  }
  if (top_p < 1) truncate_p(out, v, top, top_p);
}

// log(sum(exp(x - top))). Sums of parts are summed: one long sum would lose what comes late.
float log_sum(const float* x, int64_t v, float top) {
  Float total = zero();
  for (int64_t at = 0; at < v; at += 4 * kPart) {
    const int64_t end = std::min<int64_t>(v, at + 4 * kPart);
    Float part = zero();
    int64_t i = at;
    for (; i + kLanes <= end; i += kLanes) part = part + exp(load(x + i) - all(top));
    if (i < end) part = part + exp(load(x + i, int(end - i), kBanned) - all(top));
    total = total + part;
  }
  return std::log(sum(total));
}

void log_softmax_row(const float* x, int64_t v, float* out) {
  const float top = top_of(x, v), rest = log_sum(x, v, top);
  int64_t i = 0;
  for (; i + kLanes <= v; i += kLanes) store(out + i, load(x + i) - all(top) - all(rest));
  for (; i < v; ++i) out[i] = x[i] - top - rest;
}

// One pass over the row: its log-probabilities are written nowhere.
void pick_row(const Logprobs& a, int64_t row) {
  const float* x = a.logits + row * a.v;
  const float top = top_of(x, a.v), rest = log_sum(x, a.v, top);
  const auto logprob = [&](int64_t i) { return x[i] - top - rest; };
  const auto better = [&](int64_t i, int64_t j) {
    return logprob(i) != logprob(j) ? logprob(i) > logprob(j) : i < j;
  };
  const float own = logprob(a.ids[row]);
  int64_t rank = 1;
  int64_t* best = a.top_ids + row * a.k;  // a heap, the worst of them first
  for (int64_t i = 0; i < a.k; ++i) {
    rank += logprob(i) > own;
    best[i] = i;
  }
  std::make_heap(best, best + a.k, better);
  float worst = a.k ? logprob(best[0]) : -kBanned;
  for (int64_t i = a.k; i < a.v; i += kLanes) {
    const Float value = (i + kLanes <= a.v ? load(x + i) : load(x + i, int(a.v - i), kBanned)) - all(top) - all(rest);
    rank += __builtin_popcount(greater(value, all(own)));
    for (unsigned lanes = greater(value, all(worst)); lanes; lanes &= lanes - 1) {
      const int64_t id = i + __builtin_ctz(lanes);
      if (!(logprob(id) > worst)) continue;  // one before it was
      std::pop_heap(best, best + a.k, better);
      best[a.k - 1] = id;
      std::push_heap(best, best + a.k, better);
      worst = logprob(best[0]);
    }
  }
  std::sort_heap(best, best + a.k, better);
  a.logprob[row] = own;
  a.rank[row] = rank;
  for (int64_t i = 0; i < a.k; ++i) a.top_logprobs[row * a.k + i] = logprob(best[i]);
}

// seen, count: of each token, 0 before and after.
void penalize_row(const Penalize& a, int64_t row, int32_t* seen, int32_t* count) {
  float* out = a.out + row * a.v;
  std::copy(a.logits + row * a.v, a.logits + (row + 1) * a.v, out);
  const int64_t begin = a.history_start[row], end = a.history_start[row + 1];
  for (int64_t i = begin; i < end; ++i) {
    seen[a.history[i]] = 1;
    count[a.history[i]] += i - begin >= a.prompt_len[row];
  }
  for (int64_t i = begin; i < end; ++i) {
    const int64_t token = a.history[i];
    if (!seen[token]) continue;
    float x = out[token];
    x = x < 0 ? x * a.repetition[row] : x / a.repetition[row];
    if (count[token]) x = x - a.frequency[row] * float(count[token]) - a.presence[row];
    out[token] = x;
    seen[token] = count[token] = 0;
  }
}

uint32_t philox_word(uint64_t seed, uint32_t position, uint32_t sample, uint32_t purpose) {
  uint32_t c[4] = {position, sample, purpose, 0}, k[2] = {uint32_t(seed), uint32_t(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t(0xD2511F53) * c[0], b = uint64_t(0xCD9E8D57) * c[2];
    c[0] = uint32_t(b >> 32) ^ c[1] ^ k[0];
    c[1] = uint32_t(b);
    c[2] = uint32_t(a >> 32) ^ c[3] ^ k[1];
    c[3] = uint32_t(a);
    k[0] += 0x9E3779B9;
    k[1] += 0xBB67AE85;
  }
  return c[0];
}

}  // namespace

void philox(const Philox& a) {
  for (int64_t row = 0; row < a.r; ++row) {
    const uint32_t word = philox_word(uint64_t(a.seed[row]), uint32_t(a.position[row]), uint32_t(a.sample[row]),
                                      uint32_t(a.purpose));
    a.out[row] = float(word >> 8) * 0x1p-24f;
  }
}

void penalize(const Penalize& a) {
#pragma omp parallel if (many(a.r, a.v))
  {
    std::vector<int32_t> seen(static_cast<size_t>(a.v), 0), count(static_cast<size_t>(a.v), 0);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < a.r; ++row) penalize_row(a, row, seen.data(), count.data());
  }
  for (int64_t i = 0; i < a.num_biases; ++i) a.out[a.bias_row[i] * a.v + a.bias_id[i]] += a.bias_value[i];
}

void warp(const Warp& a) {
#pragma omp parallel if (many(a.r, a.v))
  {
    List list(a.v);
#pragma omp for schedule(dynamic)
    for (int64_t row = 0; row < a.r; ++row)
      warp_row(a.logits + row * a.v, a.v, a.temperature[row], a.min_p[row], a.top_k[row], a.top_p[row], list,
               a.out + row * a.v);
  }
}

void draw(const Draw& a) {
#pragma omp parallel for schedule(dynamic) if (many(a.r, a.v))
  for (int64_t row = 0; row < a.r; ++row) a.ids[row] = draw_row(a.logits + row * a.v, a.v, a.greedy[row], a.u[row]);
}

void logprobs(const Logprobs& a) {
#pragma omp parallel for schedule(dynamic) if (many(a.r, a.v))
  for (int64_t row = 0; row < a.r; ++row) {
    if (a.ids) {
      pick_row(a, row);
    } else {
      log_softmax_row(a.logits + row * a.v, a.v, a.all + row * a.v);
    }
  }
}

}  // namespace folo::FOLO_ISA
