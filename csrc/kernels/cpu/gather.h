// gather and scatter on the CPU: one branch's rows, packed and put back.
#pragma once

#include "kernels/gather.h"

namespace dilated::kernels::cpu {

/// Every row of `packed` is written: copies of rows, bit by bit, or zeros.
void gather(const GatherForwardArgs& args);

/// Copies bit by bit, or adds in float32 (float64 for float64), rounded once per row. No two slots
/// of a head share a row.
void scatter(const ScatterArgs& args);

}  // namespace dilated::kernels::cpu
