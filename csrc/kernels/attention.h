// What the attention kernels are given, on every device. Filled and checked by
// csrc/ops/attention.cpp; kernels trust it.
#pragma once

#include <dilated/pattern_layout.h>

#include <cstdint>

namespace dilated::kernels {

enum class Dtype : int32_t { kFloat16, kBFloat16, kFloat32, kFloat64 };

/// Element strides of a [batch, seq_len, heads, head_dim] tensor whose last dimension is
/// contiguous.
struct Strides {
  int64_t batch, row, head;

  /// From the tensor's first element to a row's, in elements. Always inlined, as files that are
  /// compiled for a newer CPU include this.
  [[gnu::always_inline]] DILATED_HOST_DEVICE inline int64_t offset(int64_t batch_index,
                                                                   int64_t row_index,
                                                                   int64_t head_index) const {
    return batch_index * batch + row_index * row + head_index * head;
  }
};

/// A [batch, seq_len, heads, head_dim] tensor, of the call's dtype unless said otherwise.
struct Rows {
  const void* data;
  Strides strides;
  int32_t element_bytes;
  bool is_aligned;  // each row of each head begins and ends at a multiple of 16 bytes
};
struct MutableRows {
  void* data;
  Strides strides;
  int32_t element_bytes;
  bool is_aligned;
};

/// Where a head's row begins. As above, always inlined.
template <typename Element>
[[gnu::always_inline]] DILATED_HOST_DEVICE inline const Element* row_at(const Rows& rows,
                                                                        int64_t batch, int64_t row,
                                                                        int64_t head) {
  return static_cast<const Element*>(rows.data) + rows.strides.offset(batch, row, head);
}
template <typename Element>
[[gnu::always_inline]] DILATED_HOST_DEVICE inline Element* row_at(const MutableRows& rows,
                                                                  int64_t batch, int64_t row,
                                                                  int64_t head) {
  return static_cast<Element*>(rows.data) + rows.strides.offset(batch, row, head);
}

/// A hash of (seed, batch entry, head, query position, key position) decides whether a pair is
/// dropped, whatever the tiling or sharding.
struct Dropout {
  float probability;    // 0: no dropout; below 1, as GPU kernels divide by 1 - probability
  double kept;          // 1 - the unrounded probability, by which the CPU divides
  const int64_t* seed;  // one number, on the tensors' device
};

/// Columns of the sums of grad_query, [batch, heads, queries, columns]. Int may be symbolic.
template <typename Int>
constexpr Int query_sums_width(const Int& head_dim) {
  return (head_dim + 15) / 16 * 16;
}

struct AttentionArgs {
  Dtype dtype;
  int64_t batch, heads, kv_heads, head_dim;
  int64_t queries, keys;  // rows of the query and of the key tensors
  bool is_causal;
  bool is_partial;  // results are in lse's dtype instead of dtype, as other blocks of keys follow
  float scale;
  double scale64;  // the same, for float64
  Dropout dropout;
  const int32_t* pattern;  // pattern_layout.h, on the tensors' device
  Rows query, key, value;
};

/// out has query's shape, and its dtype unless is_partial; lse is [batch, heads, queries], a
/// natural logarithm, float32 (float64 for float64). Every row of the pattern is written: one that
/// attends to nothing gets out = 0 and lse = -inf. A running result is that of the same queries
/// over other keys; out and lse are then over both sets of keys.
struct ForwardArgs : AttentionArgs {
  MutableRows out;
  void* lse;
  Rows running_out;         // in lse's dtype; a row whose running lse is -inf is not read
  const void* running_lse;  // laid out as lse; nullptr: no running result
  int64_t far_keys;         // rows of far_key
  Rows far_key,
      far_value;  // keys of the places from `keys` on; data is nullptr where there are none
};

/// delta[b, h, n] = sum_d grad_out * out - grad_lse, in lse's dtype; with P = multiplicity *
/// exp(score - lse): dS = P * (grad_out . value * dropout - delta), grad_query = scale * dS key,
/// grad_key = scale * dS^T query, grad_value = (P * dropout)^T grad_out. Every row of the three is
/// written, unless the kernel is told to add grad_query to sums instead. lse and delta are those of
/// all keys, also of those in other blocks.
struct BackwardArgs : AttentionArgs {
  Rows grad_out;
  const void* lse;
  const void* delta;
  MutableRows grad_query, grad_key, grad_value;
};

}  // namespace dilated::kernels
