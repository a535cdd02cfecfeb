// What an engine file says about itself: checked before TensorRT sees the engine, and held against it afterwards. The
// twin of crt_export/engine/tensorrt/sidecar.py.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "tensorrt/tensorrt_engine.hpp"

namespace crt {

/// What a TensorRT engine's sidecar says; checked before the engine is deserialised.
struct EngineSidecar {
  std::string graph;
  std::string runtime;
  std::string runtime_version;
  std::optional<int> compute_capability;
  std::int64_t capacity = 0;
  bool ampere_plus = false;
  bool version_compatible = false;
  std::map<std::string, std::array<Shape, 3>> input_shapes;  // min, opt, max
};

/// Throws Error(bundle): not JSON, or something is missing or impossible; every problem is listed.
EngineSidecar sidecar_from_json(const std::string& content, const std::string& source);
/// The sidecar of an engine file of a target; throws Error(bundle).
EngineSidecar read_sidecar(BundleFiles& files, const std::string& engine_file);

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
