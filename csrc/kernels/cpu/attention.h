// Dilated attention on the CPU: tiles of the pattern as tasks on torch's threads.
#pragma once

#include "kernels/attention.h"

namespace dilated::kernels::cpu {

/// Every row of out and lse is written. Bitwise the same whatever the number of threads.
void attention_forward(const ForwardArgs& args);

/// Every row of the three gradients is written; they need not be initialised. Bitwise the same in
/// every run with the same number of threads; if deterministic, with any number.
void attention_backward(const BackwardArgs& args, bool deterministic);

/// How the backward is cut into tasks, which decides the order of sums. true: a task is a (batch,
/// KV head, span), with five products a pair. false: tasks are key tiles, then query tiles, with
/// seven products a pair, for when the first would leave too many threads idle.
bool splits_by_span(int64_t span_tasks, int64_t threads);

enum class Isa { kBaseline, kAvx2, kAvx512 };

/// Whether this machine runs it. Unless told otherwise, the kernels use the last supported one.
bool supports(Isa isa);

/// For tests: use this one, which must be supported, from the next call on.
void use_isa(Isa isa);

}  // namespace dilated::kernels::cpu
