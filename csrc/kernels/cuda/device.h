// What the choice of kernels needs to know of a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/choose.h"

namespace dilated::kernels::cuda {

/// Asks the driver once for each device. Any thread may call.
cudaError_t find_device(int index, Device& device);

}  // namespace dilated::kernels::cuda
