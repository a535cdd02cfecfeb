// The tensor contract of a bundle's graphs: read from its manifest, and what a loaded graph is held against.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bundle/json.hpp"
#include "bundle/target.hpp"
#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

/// The contract of one graph, with float32 caches; batch, seq and capacity are negative dims.
struct GraphContract {
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  std::vector<std::pair<std::string, std::string>> aliases;    // output, input that it updates in place
  std::vector<std::pair<std::string, std::string>> continues;  // output, input of the next call that it becomes
};
using GraphContracts = std::map<std::string, GraphContract>;

/// What sessions of this model bind to a graph.
GraphContract graph_contract(const std::string& graph, const ModelConfig& config);

/// Read "contract" of a manifest that passed the schema. Throws Error(bundle) naming everything that is not what
/// sessions of this model bind, so that no graph runs whose tensors differ from those that are allocated, and every
/// graph of a target that has no contract.
GraphContracts contracts_from_json(const JsonValue& contract, const JsonValue& targets, const ModelConfig& config);

/// What differs between a loaded graph and its contract, with the target's cache dtype; empty if nothing.
std::vector<std::string> contract_problems(const GraphContract& contract, const Target& target,
                                           const std::string& graph, const Program& program);

/// Throws Error(contract) with all problems, unless there is none.
void refuse_broken_contract(const Target& target, const std::vector<std::string>& problems);

}  // namespace crt
