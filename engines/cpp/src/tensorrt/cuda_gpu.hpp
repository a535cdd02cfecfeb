// The genuine Device: an NVIDIA GPU through the CUDA runtime.
#pragma once

#include <memory>
#include <string>

#include "tensorrt/cuda_device.hpp"

namespace crt {

/// The GPU that an engine runs on.
struct Gpu {
  std::shared_ptr<Device> device;
  std::string name;
  int compute_capability = 0;  // 80 is SM 8.0
};

/// The calling thread's current GPU: GPU 0, unless the application chose another with cudaSetDevice. Throws
/// Error(missing_dependency) if there is none or its driver is absent or too old.
Gpu open_gpu();

}  // namespace crt
