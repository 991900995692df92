// Checks of the operators' arguments, and their translation to what the planner and the kernels
// take.
#pragma once

#include <ATen/core/Tensor.h>
#include <dilated/pattern.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "ops/attention_call.h"

namespace dilated::ops {

inline constexpr int64_t kMaxLength = std::numeric_limits<int32_t>::max();  // planner's, exclusive

/// As Python spells it: float32, not Float.
std::string dtype_name(at::ScalarType dtype);

/// That a tensor is given: for code that reads one before the checks below.
void check_given(const at::Tensor& tensor, const char* name);

/// That a tensor is given and, where it has data, that its memory was not freed.
void check_tensor(const at::Tensor& tensor, const char* name);

/// That the tensor is [batch, seq_len, heads, head_dim], of a dtype that kernels take.
void check_input(const at::Tensor& tensor, const char* name);

/// That the tensor is an int64 table on the CPU; `shape` describes it in the error.
void check_table(const at::Tensor& table, const at::Tensor& query, const char* name,
                 const char* shape);

/// Ranks, sizes, dtypes, devices, lists, scale, dropout: all that needs no data. Works on fake
/// tensors; what is symbolic is checked when it has a value.
void check_call(const AttentionCall& call);

/// That the scale is finite in the type that is computed in.
void check_scale(const at::Tensor& query, const std::optional<double>& scale);

/// That the tensor has query's shape and device, and this dtype.
void check_rows(const at::Tensor& query, const at::Tensor& tensor, at::ScalarType dtype,
                const char* name);

/// That lse, or its gradient, is [batch, heads, rows of query] in lse's dtype.
void check_lse(const at::Tensor& query, const at::Tensor& tensor, const char* name);

/// That writing to `written` changes none of the others, as far as torch can tell. nullptr: a
/// tensor that is not given.
void check_apart(const char* written_name, const at::Tensor& written,
                 std::initializer_list<std::pair<const char*, const at::Tensor*>> tensors);

/// The dtype of lse and delta, and of partial results.
at::ScalarType lse_dtype(const at::Tensor& query);

/// The dtype of out and of the gradients.
at::ScalarType result_dtype(const AttentionCall& call);

/// The tables to plan: those that the pass reads or, if no pattern is given and an input requires
/// gradients, both.
Directions wanted_directions(const AttentionCall& call, Directions reads);

/// Throws c10::ValueError unless the tensor is like query, as keys are: a block's have a length of
/// their own. Works on fake tensors.
void check_like_query(const AttentionCall& call, const at::Tensor& tensor, const char* name);

/// Throws c10::ValueError unless the call is of a whole sequence or a right one of a block. Works
/// on fake tensors.
void check_block(const AttentionCall& call);

/// The positions of a block's rows, which check_block() has seen.
std::vector<Range> ranges_of(const std::vector<int64_t>& numbers, int64_t rows);

/// That what attention_block_into writes shares no memory with what it reads. Not for fake tensors.
void check_results_apart(const AttentionCall& call);

/// Which rows of query the call computes.
QueryRows query_rows_of(const AttentionCall& call);

/// The rows of a checked list, call.sequences.
std::vector<Sequence> sequences_of(const at::Tensor& list);

/// Whether rows are in none of the call's sequences, so that no kernel writes their results: of the
/// whole batch, of which a block may have others.
bool has_gaps(const AttentionCall& call);

/// The pattern's specification, with wanted_directions(). Throws c10::ValueError where validate()
/// throws.
PatternSpec spec_of(const AttentionCall& call, Directions reads);

/// That the data begin where kernels can read 16 bytes at once.
void check_aligned(const at::Tensor& tensor, const char* name);

kernels::Dtype dtype_of(const at::Tensor& tensor);
/// The scale, by default 1 / sqrt(head_dim).
double scale_of(const at::Tensor& query, const std::optional<double>& scale);

/// The tensor, or a contiguous copy if its last dimension is not contiguous or its rows are 2^31
/// elements or more apart.
at::Tensor readable(const at::Tensor& tensor);

kernels::Rows rows_of(const at::Tensor& tensor);
kernels::MutableRows mutable_rows_of(const at::Tensor& tensor);

}  // namespace dilated::ops
