// The choice of the instruction set, and the kernels of the sampler as torch operators.
#include "library.h"

#include <string>
#include <string_view>

namespace folo {

const Kernels* kernels = nullptr;

namespace {

// `table` is the address of the Kernels of a loaded library, or 0: the reference.
void use(int64_t table) {
  const Kernels* wanted = reinterpret_cast<const Kernels*>(table);
  TORCH_CHECK(!wanted || std::string_view(wanted->build_key) == FOLO_BUILD_KEY,
              "the kernels' sources, compiler or torch have changed since folo was imported: start a new process");
  kernels = wanted;
}

std::string in_use() { return kernels ? kernels->name : "reference"; }

bool floats(const Tensor& logits) { return kernels && logits.scalar_type() == at::kFloat; }

Tensor rows_of(const Tensor& logits) {
  TORCH_CHECK(logits.dim() == 2, "folo's sampler takes logits of rows and tokens, got ", logits.sizes());
  return logits.contiguous();
}

template <typename T>
const T* column(const Tensor& x, int64_t length) {
  TORCH_CHECK(x.is_contiguous() && x.scalar_type() == c10::CppTypeToScalarType<T>::value && x.numel() == length,
              "folo's sampler takes a contiguous column of ", length, " ", c10::CppTypeToScalarType<T>::value,
              " here, got ", x.scalar_type(), " of ", x.sizes());
  return x.const_data_ptr<T>();
}

Tensor philox(const Tensor& seed, const Tensor& position, const Tensor& sample_index, int64_t purpose) {
  if (!kernels) return reference<Tensor>("folo_reference::philox", seed, position, sample_index, purpose);
  const int64_t r = seed.numel();
  Tensor out = at::empty(seed.sizes(), seed.options().dtype(at::kFloat));
  kernels->philox({column<int64_t>(seed, r), column<int64_t>(position, r), column<int64_t>(sample_index, r),
                   out.data_ptr<float>(), purpose, r});
  return out;
}

Tensor penalize(const Tensor& logits, const Tensor& history, const Tensor& history_start, const Tensor& prompt_len,
                const Tensor& repetition, const Tensor& presence, const Tensor& frequency, const Tensor& bias_row,
                const Tensor& bias_id, const Tensor& bias_value) {
  if (!floats(logits))
    return reference<Tensor>("folo_reference::penalize", logits, history, history_start, prompt_len, repetition,
                             presence, frequency, bias_row, bias_id, bias_value);
  const Tensor rows = rows_of(logits);
  const int64_t r = rows.size(0), tokens = history.numel(), biases = bias_id.numel();
  const int64_t* starts = column<int64_t>(history_start, r + 1);
  TORCH_CHECK(starts[r] <= tokens, "histories that end at ", starts[r], " do not fit ", tokens, " tokens");
  Tensor out = at::empty_like(rows);
  kernels->penalize({rows.const_data_ptr<float>(), column<int64_t>(history, tokens), starts,
                     column<int64_t>(prompt_len, r), column<float>(repetition, r), column<float>(presence, r),
                     column<float>(frequency, r), column<int64_t>(bias_row, biases), column<int64_t>(bias_id, biases),
                     column<float>(bias_value, biases), out.data_ptr<float>(), r, rows.size(1), biases});
  return out;
}

Tensor warp(const Tensor& logits, const Tensor& temperature, const Tensor& min_p, const Tensor& top_k,
            const Tensor& top_p, bool truncate) {
  if (!floats(logits))
    return reference<Tensor>("folo_reference::warp", logits, temperature, min_p, top_k, top_p, truncate);
  const Tensor rows = rows_of(logits);
  const int64_t r = rows.size(0);
  Tensor out = at::empty_like(rows);
  kernels->warp({rows.const_data_ptr<float>(), column<float>(temperature, r), column<float>(min_p, r),
                 column<int64_t>(top_k, r), column<float>(top_p, r), out.data_ptr<float>(), r, rows.size(1)});
  return out;
}

Tensor draw(const Tensor& logits, const Tensor& greedy, const Tensor& u) {
  if (!floats(logits)) return reference<Tensor>("folo_reference::draw", logits, greedy, u);
  const Tensor rows = rows_of(logits);
  const int64_t r = rows.size(0);
  Tensor ids = at::empty({r}, rows.options().dtype(at::kLong));
  kernels->draw({rows.const_data_ptr<float>(), column<bool>(greedy, r), column<float>(u, r), ids.data_ptr<int64_t>(),
                 r, rows.size(1)});
  return ids;
}

Tensor log_softmax(const Tensor& logits) {
  if (!floats(logits)) return reference<Tensor>("folo_reference::log_softmax", logits);
  const Tensor rows = rows_of(logits);
  Tensor out = at::empty_like(rows);
  kernels->logprobs({rows.const_data_ptr<float>(), nullptr, out.data_ptr<float>(), nullptr, nullptr, nullptr, nullptr,
                     rows.size(0), rows.size(1), 0});
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pick_logprobs(const Tensor& logits, const Tensor& ids, int64_t k) {
  if (!floats(logits))
    return reference<std::tuple<Tensor, Tensor, Tensor, Tensor>>("folo_reference::pick_logprobs", logits, ids, k);
  const Tensor rows = rows_of(logits);
  const int64_t r = rows.size(0), v = rows.size(1);
  TORCH_CHECK(0 <= k && k <= v, "there are no ", k, " likeliest of ", v, " tokens");
  Tensor logprob = at::empty({r}, rows.options()), top_logprobs = at::empty({r, k}, rows.options());
  Tensor rank = at::empty({r}, ids.options()), top_ids = at::empty({r, k}, ids.options());
  kernels->logprobs({rows.const_data_ptr<float>(), column<int64_t>(ids, r), nullptr, logprob.data_ptr<float>(),
                     rank.data_ptr<int64_t>(), top_ids.data_ptr<int64_t>(), top_logprobs.data_ptr<float>(), r, v, k});
  return {logprob, rank, top_ids, top_logprobs};
}

}  // namespace

TORCH_LIBRARY(folo_cpu, m) {
  m.def("use(int table) -> ()", &use);
  m.def("in_use() -> str", &in_use);
  m.def("build_key() -> str", [] { return std::string(FOLO_BUILD_KEY); });
}

TORCH_LIBRARY_IMPL(folo, CPU, m) {
  m.impl("philox", &philox);
  m.impl("penalize", &penalize);
  m.impl("warp", &warp);
  m.impl("draw", &draw);
  m.impl("log_softmax", &log_softmax);
  m.impl("pick_logprobs", &pick_logprobs);
}

}  // namespace folo
