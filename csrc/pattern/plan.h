// Planning one sequence, with memory that is used again.
#pragma once

#include <dilated/pattern.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "pattern/groups.h"

namespace dilated::pattern {

/// As plan(), but a batch is not joined of its lengths' patterns. `scratch` grows as needed.
std::vector<int32_t> plan_one(const PatternSpec& spec, const std::function<void()>& poll,
                              Scratch& scratch);

}  // namespace dilated::pattern
