// What an engine file says about itself: checked before TensorRT sees the engine, and held against it afterwards. The
// twin of crt_export/engine/tensorrt/sidecar.py.
#pragma once

#include <string>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "tensorrt/tensorrt_engine.hpp"

namespace crt {

/// The library and the GPU of this process.
struct EngineHost {
  std::string version;         // of the loaded library: "10.16.1.11"
  std::string gpu;             // its name
  int compute_capability = 0;  // 80 is SM 8.0
};

/// Throws Error(bundle) if the sidecar belongs to another graph or target, Error(missing_dependency) if the engine
/// needs another version of the runtime or another GPU; each with the way out.
void check_sidecar(const std::string& engine_file, const EngineSidecar& sidecar, const Target& target,
                   const std::string& graph, const EngineHost& host);

/// What the loaded engine disagrees about with its sidecar and the contract; empty if nothing.
std::vector<std::string> engine_problems(const std::vector<EngineTensor>& tensors, const EngineSidecar& sidecar,
                                         const GraphContract& contract);

}  // namespace crt
