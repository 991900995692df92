// gather and scatter on the CPU: one branch's rows, packed and put back.
#pragma once

#include "kernels/gather.h"

namespace dilated::kernels::cpu {

/// Writes every row of `packed`: a bitwise copy of a row, or zeros.
void gather(const GatherForwardArgs& args);

/// Copies bits, or adds in float32 (float64 for float64) and rounds once. No two slots of a head
/// share a row.
void scatter(const ScatterArgs& args);

}  // namespace dilated::kernels::cpu
