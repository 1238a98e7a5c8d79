// Whether a GPU and its driver can run this module at all.
#include "cuda_launch.h"

namespace spark {
namespace {

__global__ void probe() {}

}  // namespace

void check_device(int device) {
  const char* name = "check_device";
  const DeviceGuard guard(device, name);
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, probe), name);
}

}  // namespace spark
