// The only door to TensorRT and TensorRT-RTX, without their headers.
#pragma once

#include <memory>
#include <string>

#include "tensorrt/tensorrt_engine.hpp"

namespace crt {

/// Version of the loaded library: "10.16.1.11".
std::string tensorrt_version();

/// A TensorRT runtime; the engines loaded with it keep it alive.
class TensorRtApi;
/// version_compatible: its engines bring code of their own, which is allowed to run. Throws Error(missing_dependency)
/// if TensorRT does not start.
std::shared_ptr<TensorRtApi> start_tensorrt(bool version_compatible);

/// One engine to load.
struct PlanSource {
  std::string label;         // for messages
  std::string path;          // for messages
  std::string plan;          // the serialised engine
  bool ampere_plus = false;  // it must have been built for every GPU from SM 8.0 on
};

/// Deserialise an engine; throws Error(contract) with what TensorRT said.
std::shared_ptr<LoadedEngine> load_plan(const std::shared_ptr<TensorRtApi>& api, const PlanSource& source);

}  // namespace crt
