// Decoding on the CPU.
#pragma once

#include "kernels/decode.h"

namespace dilated::kernels::cpu {

void decode_attend(const DecodeAttendArgs& args);

/// Where a text would have more than max_seq_len positions: nothing is changed, and false.
bool decode_append(const DecodeAppendArgs& args);

}  // namespace dilated::kernels::cpu
