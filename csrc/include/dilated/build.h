// How this library was built.
#pragma once

#include <dilated/export.h>

namespace dilated {

/// The torch release that the library was compiled against, such as "2.11.0".
DILATED_API const char* torch_version_built() noexcept;
DILATED_API bool built_with_cuda() noexcept;

/// What the CPU kernels are run as on this machine: "avx512", "avx2" or "baseline".
DILATED_API const char* cpu_instruction_set() noexcept;

}  // namespace dilated
