// The tensor contract of the graphs for one model: what graphs/*.toml define, the twin of crt_export/spec.py.
#pragma once

#include <map>
#include <string>

#include "bundle/bundle_files.hpp"
#include "crt_runtime/config.hpp"

namespace crt {

/// The contract of every graph that a model of this kind has, with float32 caches. It comes from this library and not
/// from the bundle: whatever the manifest says, no graph runs whose tensors differ from those that sessions allocate.
std::map<std::string, GraphContract> graph_contracts(const ModelConfig& config);

}  // namespace crt
