// From a choice to the family that it names. A new family is a case more in each.
#include "kernels/cuda/attention.h"

#include "kernels/cuda/hopper/attention.h"
#include "kernels/cuda/portable/attention.h"
#include "kernels/cuda/scalar/attention.h"

namespace dilated::kernels::cuda {

cudaError_t attention_forward(const ForwardChoice& choice, const ForwardArgs& args,
                              unsigned long long* counter, cudaStream_t stream) {
  if (args.queries == 0 || args.batch == 0) {
    return cudaSuccess;
  }
  switch (choice.family) {
    case Family::kPortable:
      return portable::attention_forward(choice, args, stream);
    case Family::kHopper:
      return hopper::attention_forward(choice, args, counter, stream);
    case Family::kScalar:
      return scalar::attention_forward(choice, args, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t attention_backward(const BackwardChoice& choice, const BackwardArgs& args,
                               const BackwardWorkspace& workspace, cudaStream_t stream) {
  if (args.batch == 0 || (args.queries == 0 && args.keys == 0)) {
    return cudaSuccess;
  }
  switch (choice.family) {
    case Family::kPortable:
      return portable::attention_backward(choice, args, workspace, stream);
    case Family::kScalar:
      return scalar::attention_backward(choice, args, stream);
    case Family::kHopper:
      return hopper::attention_backward(choice, args, workspace, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dilated::kernels::cuda
