// What the attention kernels are given, on every device. Filled and checked by
// csrc/ops/attention.cpp; kernels trust it.
#pragma once

#include <cstdint>

namespace dilated::kernels {

enum class Dtype : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

/// Element strides of a [batch, seq_len, heads, head_dim] tensor whose last dimension is
/// contiguous.
struct Strides {
  int64_t batch, row, head;
};

/// A [batch, seq_len, heads, head_dim] tensor of the call's dtype, where nothing else is said.
struct Rows {
  const void* data;
  Strides strides;
};
struct MutableRows {
  void* data;
  Strides strides;
};

/// Pairs are dropped by a hash of (seed, batch, head, query position, key position): no tiling or
/// sharding changes it.
struct Dropout {
  float probability;    // 0: none; less than 1, so that one can divide by 1 - probability
  double kept;          // 1 - probability before that was rounded: what the CPU divides by
  const int64_t* seed;  // one number, where the tensors are
};

/// grad_query is summed up in [batch, heads, queries, this many columns].
constexpr int64_t query_sums_width(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

struct AttentionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, head_dim;
  int64_t queries, keys;  // rows of the query and of the key tensors
  bool is_causal;
  bool is_partial;  // results are in lse's dtype instead of dtype: other blocks of keys follow
  float scale;
  double scale64;  // the same, for float64
  Dropout dropout;
  const int32_t* pattern;  // pattern_layout.h, where the tensors are
  Rows query, key, value;
};

/// out has query's shape, and its dtype unless is_partial; lse is [batch, heads, queries], a
/// natural logarithm, float32 (float64 for float64). Every row is written: one that attends to
/// nothing gets out = 0 and lse = -inf. A running result is that of the same queries and other
/// keys; out and lse are then those of all these keys together.
struct ForwardArgs : AttentionArgs {
  MutableRows out;
  void* lse;
  Rows running_out;         // in lse's dtype; a row whose running lse is -inf is not read
  const void* running_lse;  // laid out as lse; nullptr: no running result
};

/// delta[b, h, n] = sum_d grad_out * out - grad_lse, in lse's dtype; with P = multiplicity *
/// exp(score - lse): dS = P * (grad_out . value * dropout - delta), grad_query = scale * dS key,
/// grad_key = scale * dS^T query, grad_value = (P * dropout)^T grad_out. Every row of the three is
/// written, except that a kernel may be told to add grad_query up elsewhere. lse and delta are
/// those of all keys, of which some may be elsewhere.
struct BackwardArgs : AttentionArgs {
  Rows grad_out;
  const void* lse;
  const void* delta;
  MutableRows grad_query, grad_key, grad_value;
};

}  // namespace dilated::kernels
