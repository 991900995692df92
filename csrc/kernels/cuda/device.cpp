#include "kernels/cuda/device.h"

#include <map>
#include <mutex>

#include "kernels/cuda/hopper/attention.h"

namespace dilated::kernels::cuda {
namespace {

cudaError_t read_device(int index, Device& device) {
  int major = 0, minor = 0, multiprocessors = 0, shared_bytes = 0;
  const auto read = [&](int& value, cudaDeviceAttr attribute, cudaError_t error) {
    return error == cudaSuccess ? cudaDeviceGetAttribute(&value, attribute, index) : error;
  };
  cudaError_t error = read(major, cudaDevAttrComputeCapabilityMajor, cudaSuccess);
  error = read(minor, cudaDevAttrComputeCapabilityMinor, error);
  error = read(multiprocessors, cudaDevAttrMultiProcessorCount, error);
  error = read(shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, error);
  const int32_t capability = 10 * major + minor;
  device = {capability, multiprocessors, static_cast<size_t>(shared_bytes),
            capability == 90 && hopper::is_available()};
  return error;
}

}  // namespace

cudaError_t find_device(int index, Device& device) {
  static std::mutex mutex;
  static std::map<int, Device> devices;
  const std::lock_guard lock(mutex);
  if (const auto known = devices.find(index); known != devices.end()) {
    device = known->second;
    return cudaSuccess;
  }
  const cudaError_t error = read_device(index, device);
  if (error == cudaSuccess) {
    devices.emplace(index, device);
  }
  return error;
}

}  // namespace dilated::kernels::cuda
