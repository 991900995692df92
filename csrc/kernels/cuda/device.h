// What the choice of kernels needs to know of a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/cuda/choose.h"

namespace dilated::kernels::cuda {

/// The driver is asked once for each device. For any thread.
cudaError_t find_device(int index, Device& device);

}  // namespace dilated::kernels::cuda
