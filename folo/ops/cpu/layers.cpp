// The kernels of the decoder as torch operators: checks, and output tensors.
#include "library.h"

namespace folo {
namespace {

bool known(const Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return kernels && (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf);
}

Dtype dtype_of(const Tensor& x) {
  return x.scalar_type() == at::kFloat      ? Dtype::kFloat32
         : x.scalar_type() == at::kBFloat16 ? Dtype::kBFloat16
                                            : Dtype::kFloat16;
}

void same_dtype(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others)
    TORCH_CHECK(other->scalar_type() == x.scalar_type(), "folo's ops take tensors of one dtype: ", x.scalar_type(),
                " and ", other->scalar_type());
}

const void* data(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }

// A bias, or the weight of a norm: for each of n columns of x.
Tensor of_columns(const Tensor& weight, const Tensor& x, int64_t n) {
  same_dtype(x, {&weight});
  TORCH_CHECK(weight.numel() == n, "a bias or norm of ", weight.sizes(), " does not fit ", n, " columns");
  return weight.contiguous();
}
Maybe of_columns(const Maybe& weight, const Tensor& x, int64_t n) {
  return weight ? Maybe(of_columns(*weight, x, n)) : Maybe();
}

// An output of x's kind, in fp32 where it is wide.
Tensor out_of(const Tensor& x, int64_t n, bool wide) {
  return at::empty({x.size(0), n}, wide ? x.options().dtype(at::kFloat) : x.options());
}

Tensor product(const Tensor& x, const Tensor& packed, int64_t n, const Maybe& bias, bool gated, bool wide) {
  same_dtype(x, {&packed});
  const Tensor rows = x.contiguous();
  const int64_t k = rows.size(1), per = x.scalar_type() == at::kBFloat16 ? 2 : 1;
  const int64_t tiles = (n + 15) / 16, depth = per == 2 ? (k + 31) / 32 * 16 : k;
  TORCH_CHECK(rows.dim() == 2 && k > 0 && packed.is_contiguous() && packed.size(0) == tiles &&
                  packed.size(1) == depth && packed.numel() == tiles * depth * 16 * per,
              "a packed weight of ", packed.sizes(), " does not fit x ", x.sizes(), " and ", n, " outputs");
  const Maybe biases = of_columns(bias, x, n);
  Tensor out = out_of(rows, gated ? n / 2 : n, wide);
  kernels->linear({dtype_of(x), rows.const_data_ptr(), packed.const_data_ptr(), data(biases), out.data_ptr(),
                   rows.size(0), n, k, gated, wide});
  return out;
}

Tensor packed_linear(const Tensor& x, const Tensor& packed, int64_t n, const Maybe& bias, bool wide) {
  if (!known(x)) return reference<Tensor>("folo_reference::packed_linear", x, packed, n, bias, wide);
  return product(x, packed, n, bias, false, wide);
}

Tensor silu_mul(const Tensor& gate_up);

Tensor packed_gated_linear(const Tensor& x, const Tensor& packed, int64_t n, const Maybe& bias) {
  if (!known(x)) return reference<Tensor>("folo_reference::packed_gated_linear", x, packed, n, bias);
  if (n % 32) return silu_mul(product(x, packed, n, bias, false, false));  // gate and up share a tile
  return product(x, packed, n, bias, true, false);
}

Tensor linear(const Tensor& x, const Tensor& weight, const Maybe& bias, bool wide) {
  if (!known(x)) return reference<Tensor>("folo_reference::linear", x, weight, bias, wide);
  return packed_linear(x, reference<Tensor>("folo::pack", weight), weight.size(0), bias, wide);
}

Tensor quantized_linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const Tensor& zeros,
                        const Maybe& columns, int64_t n, const Maybe& bias, bool wide) {
  if (!known(x))
    return reference<Tensor>("folo_reference::quantized_linear", x, codes, scales, zeros, columns, n, bias, wide);
  const Tensor rows = x.contiguous();
  const Maybe places = columns ? Maybe(columns->contiguous()) : Maybe();
  const Maybe biases = of_columns(bias, x, n);
  const int64_t k = rows.size(1), tiles = (n + 15) / 16, blocks = codes.size(1), spans = scales.size(1);
  int64_t span = 1;
  while (span < 4 && span * spans < blocks) span *= 2;
  TORCH_CHECK(codes.is_contiguous() && scales.is_contiguous() && zeros.is_contiguous() &&
                  codes.scalar_type() == at::kInt && scales.scalar_type() == at::kHalf &&
                  zeros.scalar_type() == at::kByte && (!places || places->scalar_type() == at::kLong),
              "a quantised weight has other dtypes, and its parts are contiguous");
  TORCH_CHECK(rows.dim() == 2 && codes.size(0) == tiles && codes.size(3) == 16 && scales.sizes() == zeros.sizes() &&
                  scales.size(0) == tiles && scales.size(2) == 16 && (blocks + span - 1) / span == spans &&
                  (places ? places->size(0) == 32 * blocks : k <= 32 * blocks && 32 * blocks < k + 32),
              "a quantised weight of ", codes.sizes(), " does not fit x ", x.sizes(), " and ", n, " outputs");
  const int64_t bits = codes.size(2);
  TORCH_CHECK(bits == 2 || bits == 4 || bits == 8, "a quantised weight has 2, 4 or 8 bits, not ", bits);
  Tensor out = out_of(rows, n, wide);
  kernels->quantized({dtype_of(x), rows.const_data_ptr(), codes.const_data_ptr<int32_t>(),
                      static_cast<const fp16*>(scales.const_data_ptr()), zeros.const_data_ptr<uint8_t>(),
                      places ? places->const_data_ptr<int64_t>() : nullptr, data(biases), out.data_ptr(),
                      rows.size(0), n, k, bits, blocks, span, wide});
  return out;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  if (!known(x)) return reference<Tensor>("folo_reference::rms_norm", x, weight, eps);
  const int64_t d = x.size(-1), m = d ? x.numel() / d : 0;
  const Tensor rows = x.contiguous(), scale = of_columns(weight, x, d);
  Tensor out = at::empty_like(rows);
  kernels->norm({dtype_of(x), rows.const_data_ptr(), nullptr, scale.const_data_ptr(), out.data_ptr(), nullptr, m, d,
                 float(eps)});
  return out;
}

std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  if (!known(x))
    return reference<std::tuple<Tensor, Tensor>>("folo_reference::add_rms_norm", x, residual, weight, eps);
  same_dtype(x, {&residual});
  TORCH_CHECK(x.dim() == 2 && x.sizes() == residual.sizes(), "a residual of ", residual.sizes(), " does not fit x ",
              x.sizes());
  const Tensor rows = x.contiguous(), others = residual.contiguous(), scale = of_columns(weight, x, x.size(1));
  Tensor out = at::empty_like(rows), total = at::empty_like(rows);
  kernels->norm({dtype_of(x), rows.const_data_ptr(), others.const_data_ptr(), scale.const_data_ptr(), out.data_ptr(),
                 total.data_ptr(), rows.size(0), rows.size(1), float(eps)});
  return {out, total};
}

Tensor silu_mul(const Tensor& gate_up) {
  if (!known(gate_up)) return reference<Tensor>("folo_reference::silu_mul", gate_up);
  TORCH_CHECK(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "no two halves of columns: ", gate_up.sizes());
  const Tensor rows = gate_up.contiguous();
  const int64_t m = rows.size(0), n = rows.size(1) / 2;
  Tensor out = at::empty({m, n}, rows.options());
  kernels->silu_mul({dtype_of(rows), rows.const_data_ptr(), out.data_ptr(), m, n});
  return out;
}

// Where blocks and heads begin, in units of 4 bytes, of caches as folo/ops/kv_cache.py lays them.
Strides strides_of(const Tensor& k, const Tensor& v, int64_t dim) {
  const int64_t per = 4 / k.element_size(), size = k.size(1);
  const auto lie = [](const Tensor& x, at::IntArrayRef inner) {  // as these do, blocks and heads anywhere
    for (int64_t i = 0; i < x.dim(); ++i)
      if (inner[size_t(i)] && x.size(i) > 1 && x.stride(i) != inner[size_t(i)]) return false;
    return true;
  };
  const bool alike = per == 2 ? k.dim() == 5 && v.dim() == 5 && lie(k, {0, 2, 0, 2 * size, 1}) &&
                                    lie(v, {0, 2 * dim, 1, 0, 2})
                              : k.dim() == 4 && v.dim() == 4 && lie(k, {0, 1, 0, size}) && lie(v, {0, dim, 0, 1});
  TORCH_CHECK(k.size(0) == v.size(0) && k.size(2) == v.size(-2) && v.size(-1) == dim &&
                  k.numel() == k.size(0) * size * k.size(2) * dim &&
                  v.numel() == v.size(0) * ((size + per - 1) / per * per) * v.size(-2) * dim,
              "K and V of ", k.sizes(), " and ", v.sizes(), " are not of one cache, of heads of ", dim);
  TORCH_CHECK(alike, "K and V lie as folo.ops.kv_cache.zeros lays them, not in ", k.sizes(), " by ", k.strides());
  return {k.stride(0) / per, k.stride(2) / per, v.stride(0) / per, v.stride(v.dim() - 2) / per};
}

uint32_t* units(const Tensor& cache) { return static_cast<uint32_t*>(cache.mutable_data_ptr()); }

Tensor qk_norm_rope_write(const Tensor& qkv, const Tensor& angles, const Maybe& q_norm, const Maybe& k_norm,
                          double eps, Tensor k_cache, Tensor v_cache, const Tensor& slots) {
  if (!known(qkv))
    return reference<Tensor>("folo_reference::qk_norm_rope_write", qkv, angles, q_norm, k_norm, eps, k_cache, v_cache,
                             slots);
  same_dtype(qkv, {&k_cache, &v_cache});
  const Tensor rows = qkv.contiguous(), turns = angles.contiguous(), places = slots.contiguous();
  TORCH_CHECK(turns.scalar_type() == at::kFloat && places.scalar_type() == at::kLong,
              "angles are float32 and slots int64");
  const int64_t t = rows.size(0), d = turns.size(1), kv = k_cache.size(2);
  TORCH_CHECK(turns.dim() == 2 && turns.size(0) == t && d > 0 && d % 2 == 0 && places.numel() == t,
              "angles of ", turns.sizes(), " and slots of ", places.sizes(), " do not fit ", t, " rows");
  const int64_t heads = rows.size(1) / d - 2 * kv;
  TORCH_CHECK(heads > 0 && rows.size(1) == (heads + 2 * kv) * d, "rows of ", rows.size(1), " are no heads of ", d);
  TORCH_CHECK(q_norm.has_value() == k_norm.has_value(), "queries and keys are both normalised, or neither");
  const Maybe q_scale = of_columns(q_norm, rows, d), k_scale = of_columns(k_norm, rows, d);
  Tensor q = at::empty({t, heads, d}, rows.options());
  kernels->rope({dtype_of(rows), rows.const_data_ptr(), turns.const_data_ptr<float>(),
                 data(q_scale), data(k_scale), units(k_cache), units(v_cache), strides_of(k_cache, v_cache, d),
                 k_cache.size(1), places.const_data_ptr<int64_t>(), q.data_ptr(), t, heads, kv, d, float(eps)});
  return q;
}

Tensor paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& block_tables,
                       const Tensor& query_start, const Tensor& seq_lens, double scale) {
  if (!known(q))
    return reference<Tensor>("folo_reference::paged_attention", q, k_cache, v_cache, block_tables, query_start,
                             seq_lens, scale);
  same_dtype(q, {&k_cache, &v_cache});
  const Tensor rows = q.contiguous(), tables = block_tables.contiguous(), starts = query_start.contiguous(),
               lens = seq_lens.contiguous();
  TORCH_CHECK(tables.scalar_type() == at::kInt && starts.scalar_type() == at::kInt && lens.scalar_type() == at::kInt,
              "block_tables, query_start and seq_lens are int32");
  const int64_t count = lens.numel(), kv = k_cache.size(2);
  TORCH_CHECK(rows.dim() == 3 && kv > 0 && rows.size(1) % kv == 0, "queries of ", rows.sizes(), " do not fit ", kv,
              " KV heads");
  TORCH_CHECK(tables.dim() == 2 && tables.size(0) == count && starts.numel() == count + 1 &&
                  starts.const_data_ptr<int32_t>()[count] <= rows.size(0),
              "block_tables of ", tables.sizes(), " and query_start of ", starts.sizes(), " do not fit ", count,
              " sequences and ", rows.size(0), " queries");
  Tensor out = at::empty_like(rows);
  kernels->attention({dtype_of(q), rows.const_data_ptr(), units(k_cache), units(v_cache),
                      strides_of(k_cache, v_cache, q.size(2)), tables.const_data_ptr<int32_t>(),
                      starts.const_data_ptr<int32_t>(), lens.const_data_ptr<int32_t>(), out.data_ptr(), count,
                      tables.size(1), k_cache.size(1), q.size(1), kv, q.size(2), float(scale)});
  return out;
}

// Of a weight in either layout of the kernels: the parts that folo/ops/library.py gives to its op.
Tensor linear_of(const Tensor& x, at::TensorList weight, int64_t n, const Maybe& bias) {
  if (weight.size() == 1) return packed_linear(x, weight[0], n, bias, false);
  TORCH_CHECK(weight.size() == 3 || weight.size() == 4, "a weight has 1, 3 or 4 parts, not ", weight.size());
  const Maybe columns = weight.size() == 4 ? Maybe(weight[3]) : Maybe();
  return quantized_linear(x, weight[0], weight[1], weight[2], columns, n, bias, false);
}

Tensor gated_linear_of(const Tensor& x, at::TensorList weight, int64_t n, const Maybe& bias) {
  if (weight.size() == 1) return packed_gated_linear(x, weight[0], n, bias);
  return silu_mul(linear_of(x, weight, n, bias));
}

// Tensors one after the other, in groups of these sizes.
struct Groups {
  at::TensorList tensors;
  at::IntArrayRef sizes;

  at::TensorList next() {
    TORCH_CHECK(!sizes.empty() && sizes[0] >= 0 && size_t(sizes[0]) <= tensors.size(),
                "fewer tensors than the sizes of their groups say");
    const at::TensorList group = tensors.slice(0, size_t(sizes[0]));
    tensors = tensors.slice(group.size());
    sizes = sizes.slice(1);
    return group;
  }
  const Tensor& one() {
    const at::TensorList group = next();
    TORCH_CHECK(group.size() == 1, "a norm is one tensor");
    return group[0];
  }
  Maybe optional() {
    const at::TensorList group = next();
    TORCH_CHECK(group.size() <= 1, "a bias or norm is one tensor");
    return group.empty() ? Maybe() : Maybe(group[0]);
  }
};

// Decoder layers, their ops one after the other: to call them from Python takes longer than some of them do. What
// folo/model/forward.py does op by op where weights are plain.
std::tuple<Tensor, Tensor> decoder_layers(
    const Tensor& x, const Tensor& residual, const Tensor& angles, at::TensorList weights, at::IntArrayRef sizes,
    int64_t num_heads, int64_t inner, double eps, double scale, at::TensorList k_caches, at::TensorList v_caches,
    const Tensor& slots, const Tensor& block_tables, const Tensor& query_start, const Tensor& seq_lens,
    const Maybe& wanted) {
  TORCH_CHECK(k_caches.size() == v_caches.size() && sizes.size() == 12 * k_caches.size(),
              "each layer has a K, a V and 12 groups of tensors");
  Groups groups{weights, sizes};
  Tensor normed = x, total = residual;
  for (size_t layer = 0; layer < k_caches.size(); ++layer) {
    const Tensor &k = k_caches[layer], &v = v_caches[layer];
    const auto linear = [&](const Tensor& rows, int64_t n) {
      const at::TensorList weight = groups.next();
      return linear_of(rows, weight, n, groups.optional());
    };
    // One name for what comes of one op and goes to the next: its memory is free again where that is done.
    Tensor rows = linear(normed, (num_heads + 2 * k.size(2)) * angles.size(1));
    const Maybe q_norm = groups.optional(), k_norm = groups.optional();
    rows = qk_norm_rope_write(rows, angles, q_norm, k_norm, eps, k, v, slots);
    rows = paged_attention(rows, k, v, block_tables, query_start, seq_lens, scale).flatten(1);
    if (wanted && layer + 1 == k_caches.size()) {
      rows = rows.index_select(0, *wanted);
      total = total.index_select(0, *wanted);
    }
    rows = linear(rows, x.size(1));
    std::tie(normed, total) = add_rms_norm(rows, total, groups.one(), eps);
    const at::TensorList gate_up = groups.next();
    rows = gated_linear_of(normed, gate_up, 2 * inner, groups.optional());
    rows = linear(rows, x.size(1));
    std::tie(normed, total) = add_rms_norm(rows, total, groups.one(), eps);
  }
  return {normed, total};
}

}  // namespace

TORCH_LIBRARY_IMPL(folo, CPU, m) {
  m.impl("packed_linear", &packed_linear);
  m.impl("packed_gated_linear", &packed_gated_linear);
  m.impl("linear", &linear);
  m.impl("quantized_linear", &quantized_linear);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("silu_mul", &silu_mul);
  m.impl("qk_norm_rope_write", &qk_norm_rope_write);
  m.impl("paged_attention", &paged_attention);
  m.impl("decoder_layers", &decoder_layers);
}

}  // namespace folo
