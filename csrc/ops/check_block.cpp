// What blocks of a sequence have beyond other calls: where their rows lie, and far keys.
#include <c10/util/Exception.h>

#include <string>
#include <tuple>
#include <utility>

#include "ops/checks.h"

namespace dilated::ops {
namespace {

/// numbers: AttentionBlock's, of the tensor's rows. The planner checks their order.
void check_stretches(const std::vector<int64_t>& numbers, const at::Tensor& tensor, int64_t seq_len,
                     const char* name) {
  c10::SymInt rest = tensor.sym_size(1);
  for (size_t i = 0; i + 1 < numbers.size(); i += 2) {
    const int64_t begin = numbers[i], end = numbers[i + 1];
    TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= seq_len, name,
                      ": must have 0 <= begin <= end <= seq_len, ", seq_len, ", got begin ", begin,
                      ", end ", end);
    rest = rest - (end - begin);
  }
  if (numbers.size() % 2 == 0) {
    TORCH_CHECK_VALUE(rest == 0, name, ": must have as many positions as the tensor has rows, ",
                      tensor.sym_size(1), ", got ", at::IntArrayRef(numbers));
    return;
  }
  const int64_t begin = numbers.back();
  TORCH_CHECK_VALUE(0 <= begin && begin <= seq_len && rest <= seq_len - begin && rest >= 0, name,
                    ": must be at least 0, and at most seq_len with the rows added, got ", name,
                    " ", begin, ", rows ", rest, ", seq_len ", seq_len);
}

/// Results are written where they are.
void check_into(const AttentionCall& call) {
  const at::Tensor &out = *call.block->out, &lse = *call.block->lse;
  check_rows(call.query, out, call.query.scalar_type(), "out");
  check_lse(call.query, lse, "lse");
  TORCH_CHECK_VALUE(out.is_contiguous(), "out: must be contiguous, got strides ",
                    out.sym_strides());
  TORCH_CHECK_VALUE(lse.is_contiguous(), "lse: must be contiguous, got strides ",
                    lse.sym_strides());
}

void check_far(const AttentionCall& call) {
  const FarKeys& far = *call.far;
  const bool needs_far = query_rows_of(call) != QueryRows::kNear || far.key || far.value;
  for (const auto& [name, rows] : {std::pair("far_key", &far.key), {"far_value", &far.value}}) {
    TORCH_CHECK_VALUE(!needs_far || rows->has_value(), name, ": must be a tensor, got None");
  }
  if (far.key.has_value()) {
    for (const auto& [name, far_rows, rows] : {std::tuple("far_key", &*far.key, &call.key),
                                               std::tuple("far_value", &*far.value, &call.value)}) {
      check_like_query(call, *far_rows, name);
      TORCH_CHECK_VALUE(far_rows->sym_size(2) == rows->sym_size(2), name,
                        ": must have the heads of key, ", rows->sym_size(2), ", got ",
                        far_rows->sym_size(2));
    }
    TORCH_CHECK_VALUE(far.value->sym_size(1) == far.key->sym_size(1),
                      "far_value: must have the rows of far_key, ", far.key->sym_size(1), ", got ",
                      far.value->sym_size(1));
    check_stretches(far.keys, *far.key, call.block->seq_len, "far_keys");
  } else {
    TORCH_CHECK_VALUE(far.keys.size() % 2 == 0,
                      "far_keys: must be begin and end of stretches where far_key is None, got ",
                      at::IntArrayRef(far.keys));
  }
  check_into(call);
}

}  // namespace

std::vector<Range> ranges_of(const std::vector<int64_t>& numbers, int64_t rows) {
  std::vector<Range> ranges;
  for (size_t i = 0; i < numbers.size(); i += 2) {
    const int64_t begin = numbers[i];
    ranges.push_back({begin, i + 1 < numbers.size() ? numbers[i + 1] : begin + rows});
    rows -= ranges.back().end - begin;
  }
  return ranges;
}

void check_block(const AttentionCall& call) {
  if (!call.block.has_value()) {
    return;
  }
  const AttentionBlock& block = *call.block;
  TORCH_CHECK_VALUE(0 <= block.seq_len && block.seq_len < kMaxLength,
                    "seq_len: must be at least 0 and below 2^31 - 1, got ", block.seq_len);
  check_stretches(block.queries, call.query, block.seq_len, "queries");
  check_stretches(block.keys, call.key, block.seq_len, "keys");
  if (call.far.has_value()) {
    check_far(call);
    return;
  }
  TORCH_CHECK_VALUE(block.out.has_value() == block.lse.has_value(),
                    "out and lse: must be given both or neither, as a running result, got ",
                    block.out.has_value() ? "out" : "lse", " alone");
  if (block.out.has_value()) {
    check_rows(call.query, *block.out, lse_dtype(call.query), "out");
    check_lse(call.query, *block.lse, "lse");
  }
}

void check_results_apart(const AttentionCall& call) {
  const at::Tensor &out = *call.block->out, &lse = *call.block->lse;
  const at::Tensor* far_key = call.far->key.has_value() ? &*call.far->key : nullptr;
  const at::Tensor* far_value = call.far->value.has_value() ? &*call.far->value : nullptr;
  for (const auto& [name, written] : {std::pair("out", &out), std::pair("lse", &lse)}) {
    check_apart(name, *written,
                {{"query", &call.query},
                 {"key", &call.key},
                 {"value", &call.value},
                 {"far_key", far_key},
                 {"far_value", far_value}});
  }
  check_apart("out", out, {{"lse", &lse}});
}

QueryRows query_rows_of(const AttentionCall& call) {
  const std::string rows = call.far.has_value() ? call.far->rows : "all";
  TORCH_CHECK_VALUE(rows == "all" || rows == "near" || rows == "far",
                    "rows: must be \"all\", \"near\" or \"far\", got \"", rows, "\"");
  return rows == "near" ? QueryRows::kNear : rows == "far" ? QueryRows::kFar : QueryRows::kAll;
}

}  // namespace dilated::ops
