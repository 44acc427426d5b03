// What the library of an instruction set offers to that of the operators: plain functions on plain memory.
#pragma once

#include <cstdint>

namespace folo {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

struct Linear {
  Dtype dtype;
  const void* x;       // [m, k]
  const void* weight;  // [ceil(n / 16)] tiles of 16 columns; see linear.cpp
  const void* bias;    // [n], or null
  void* out;           // [m, n]
  int64_t m, n, k;
  bool gated;  // the first half of the columns is a gate's, and out [m, n / 2] is silu(gate) times the other;
               // n is a multiple of 32
  bool wide;   // out is in fp32, whatever the dtype of the others; not if gated
};

struct Quantized {
  Dtype dtype;
  const void* x;           // [m, k]
  const int32_t* codes;    // [ceil(n / 16)][blocks][bits][16]
  const fp16* scales;      // [ceil(n / 16)][ceil(blocks / span)][16]
  const uint8_t* zeros;    // as scales
  const int64_t* columns;  // [32 blocks]: the column of x at each place, or none below k; null: in order
  const void* bias;        // [n], or null
  void* out;               // [m, n]
  int64_t m, n, k, bits, blocks, span;
  bool wide;  // out is in fp32, whatever the dtype of the others
};

struct Norm {
  Dtype dtype;
  const void* x;         // [m, d]
  const void* residual;  // [m, d], or null
  const void* weight;    // [d]
  void* out;             // [m, d]
  void* total;           // [m, d]: x + residual, if there is a residual
  int64_t m, d;
  float eps;
};

struct SiluMul {
  Dtype dtype;
  const void* gate_up;  // [m, 2 n]
  void* out;            // [m, n]
  int64_t m, n;
};

// K and V of a head in a block, in units of 4 bytes, each one element or two: K is [head_dim / per][block_size], with
// a unit of `per` elements of one key, V [block_size / per][head_dim], with one element each of `per` keys
// (folo/ops/kv_cache.py). Where a block and a head begin, in units:
struct Strides {
  int64_t k_block, k_head, v_block, v_head;
};

struct Rope {
  Dtype dtype;
  const void* qkv;             // [t, (num_heads + 2 num_kv_heads) head_dim]
  const float* angles;         // [t, head_dim]: cosines, sines
  const void *q_norm, *k_norm;  // [head_dim], or null
  uint32_t *k_cache, *v_cache;
  Strides strides;
  int64_t block_size;
  const int64_t* slots;        // [t]: block * block_size + offset; negative: written nowhere
  void* q;                     // [t, num_heads, head_dim]
  int64_t t, num_heads, num_kv_heads, head_dim;
  float eps;
};

struct Attention {
  Dtype dtype;
  const void* q;                    // [t, num_heads, head_dim]
  const uint32_t *k_cache, *v_cache;
  Strides strides;
  const int32_t* block_tables;      // [sequences, table_width]
  const int32_t *query_start, *seq_lens;
  void* out;                        // as q
  int64_t num_sequences, table_width, block_size, num_heads, num_kv_heads, head_dim;
  float scale;
};

struct Philox {
  const int64_t *seed, *position, *sample;  // [r]
  float* out;
  int64_t purpose, r;
};

// Rows of logits, all float32 [r, v].
struct Penalize {
  const float* logits;
  const int64_t *history, *history_start, *prompt_len;
  const float *repetition, *presence, *frequency;
  const int64_t *bias_row, *bias_id;
  const float* bias_value;
  float* out;
  int64_t r, v, num_biases;
};

struct Warp {
  const float* logits;
  const float *temperature, *min_p;
  const int64_t* top_k;
  const float* top_p;
  float* out;
  int64_t r, v;
};

struct Draw {
  const float* logits;
  const bool* greedy;
  const float* u;
  int64_t* ids;
  int64_t r, v;
};

struct Logprobs {
  const float* logits;
  const int64_t* ids;  // [r], or null: `all` is wanted
  float* all;          // [r, v]
  float* logprob;      // [r]
  int64_t *rank, *top_ids;
  float* top_logprobs;
  int64_t r, v, k;
};

// What such a library hands over (table.cpp).
struct Kernels {
  const char* build_key;
  const char* name;
  void (*linear)(const Linear&);
  void (*quantized)(const Quantized&);
  void (*norm)(const Norm&);
  void (*silu_mul)(const SiluMul&);
  void (*rope)(const Rope&);
  void (*attention)(const Attention&);
  void (*philox)(const Philox&);
  void (*penalize)(const Penalize&);
  void (*warp)(const Warp&);
  void (*draw)(const Draw&);
  void (*logprobs)(const Logprobs&);
};

#define FOLO_DECLARE(ISA)                 \
  namespace ISA {                         \
  void linear(const Linear&);             \
  void quantized(const Quantized&);       \
  void norm(const Norm&);                 \
  void silu_mul(const SiluMul&);          \
  void rope(const Rope&);                 \
  void attention(const Attention&);       \
  void philox(const Philox&);             \
  void penalize(const Penalize&);         \
  void warp(const Warp&);                 \
  void draw(const Draw&);                 \
  void logprobs(const Logprobs&);         \
  }
FOLO_DECLARE(avx2)
FOLO_DECLARE(avx512)
FOLO_DECLARE(avx512_bf16)
FOLO_DECLARE(amx)
#undef FOLO_DECLARE

}  // namespace folo
