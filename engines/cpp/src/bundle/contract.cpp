#include "bundle/contract.hpp"

#include <algorithm>
#include <sstream>

#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;
using NamePairs = std::vector<std::pair<std::string, std::string>>;
using Specs = std::vector<TensorSpec>;

constexpr std::int64_t kBatch = -1, kSeq = -2, kCapacity = -3;
constexpr char kPrefills[] = "prefill prefill_pass", kTokens[] = "step prefill prefill_pass";

/// A tensor that sessions bind, dims in the words of the glossary; those of caches and states follow from the model.
struct BoundTensor {
  const char* graphs;
  const char* name;
  DType dtype;
  const char* dims;
  const char* continues = "";  ///< input of the next call that an output becomes
};
const std::vector<BoundTensor> kInputs{
    {names::kGraphStep, names::kInputIds, DType::int64, "batch 1"},
    {kPrefills, names::kInputIds, DType::int64, "batch seq"},
    {kPrefills, names::kLength, DType::int64, "batch"},
    {kTokens, names::kPosition, DType::int64, "batch"},
    {names::kGraphHead, names::kHidden, DType::float32, "batch seq hidden"},
};
const std::vector<BoundTensor> kOutputs{
    {kTokens, names::kLogits, DType::float32, "batch vocab"},
    {names::kGraphHead, names::kLogits, DType::float32, "batch seq vocab"},
    {kTokens, names::kNextToken, DType::int64, "batch 1", names::kInputIds},
    {kTokens, names::kNextPosition, DType::int64, "batch", names::kPosition},
    {kPrefills, names::kNextHidden, DType::float32, "batch seq hidden"},
};

Specs specs_of(const std::string& graph, const std::vector<BoundTensor>& tensors, const ModelConfig& config,
               NamePairs& continues) {
  const std::map<std::string, std::int64_t> sizes{
      {"1", 1}, {"batch", kBatch}, {"seq", kSeq}, {"hidden", config.hidden}, {"vocab", config.vocab}};
  Specs specs;
  for (const BoundTensor& tensor : tensors) {
    if (!is_word(tensor.graphs, graph)) continue;
    TensorSpec& spec = specs.emplace_back(TensorSpec{tensor.name, tensor.dtype, {}});
    std::istringstream words(tensor.dims);
    for (std::string word; words >> word;) spec.dims.push_back(sizes.at(word));
    if (*tensor.continues != '\0') continues.emplace_back(tensor.name, tensor.continues);
  }
  return specs;
}

std::string form_of(const TensorSpec& spec) {
  std::string dims;
  for (const std::int64_t dim : spec.dims) dims += (dims.empty() ? "" : ", ") + (dim < 0 ? "?" : std::to_string(dim));
  return std::string(name_of(spec.dtype)) + " [" + dims + "]";
}

std::map<std::string, const TensorSpec*> by_name(const Specs& specs) {
  std::map<std::string, const TensorSpec*> found;
  for (const TensorSpec& spec : specs) found.emplace(spec.name, &spec);
  return found;
}

using SameDim = bool (*)(std::int64_t wanted, std::int64_t found);

/// Compares two lists by name.
void compare(const std::string& where, const Specs& wanted, const Specs& found, SameDim same, Problems& problems) {
  const auto wanted_names = by_name(wanted), found_names = by_name(found);
  for (const auto& [name, spec] : found_names) {
    if (wanted_names.count(name) == 0) problems.push_back(where + name + " is not part of the contract");
  }
  for (const TensorSpec& spec : wanted) {
    const auto other = found_names.find(spec.name);
    if (other == found_names.end()) {
      problems.push_back(where + spec.name + " is missing");
    } else if (spec.dtype != other->second->dtype ||
               !std::equal(spec.dims.begin(), spec.dims.end(), other->second->dims.begin(), other->second->dims.end(),
                           same)) {
      problems.push_back(where + spec.name + ": " + form_of(*other->second) + " was expected to be " + form_of(spec));
    }
  }
  if (found_names.size() != found.size()) problems.push_back(where + "a name stands twice");
}

/// A dim of the manifest; 0, which no tensor has, for what is none.
std::int64_t dim_from(const JsonValue& dim) {
  if (dim.is_integer()) return std::max<std::int64_t>(dim.integer(), 0);
  const std::string word = dim.is_string() ? dim.string() : "";
  return word == "batch" ? kBatch : word == "seq" ? kSeq : word == "capacity" ? kCapacity : 0;
}

/// The tensors of a graph's side; those of a dtype that no graph has are problems.
Specs specs_from_json(const std::string& where, const JsonArray& entries, Problems& problems) {
  Specs specs;
  for (const JsonValue& entry : entries) {
    TensorSpec spec{entry.at("name").string(), DType::float32, {}};
    const std::string& dtype = entry.at("dtype").string();
    if (dtype == name_of(DType::int64)) spec.dtype = DType::int64;
    if (dtype != name_of(spec.dtype)) problems.push_back(where + spec.name + " has dtype " + in_quotes(dtype));
    for (const JsonValue& dim : entry.at("dims").array()) spec.dims.push_back(dim_from(dim));
    specs.push_back(std::move(spec));
  }
  return specs;
}

NamePairs pairs_from_json(const JsonArray& entries) {
  NamePairs pairs;
  for (const JsonValue& pair : entries) pairs.emplace_back(pair.array()[0].string(), pair.array()[1].string());
  return pairs;
}

GraphContract contract_from_json(const std::string& graph, const JsonValue& entry, const ModelConfig& config,
                                 Problems& problems) {
  const SameDim same = [](std::int64_t a, std::int64_t b) { return a == b; };
  GraphContract bound = graph_contract(graph, config);
  GraphContract found;
  found.inputs = specs_from_json(graph + ": input ", entry.at("inputs").array(), problems);
  found.outputs = specs_from_json(graph + ": output ", entry.at("outputs").array(), problems);
  found.aliases = pairs_from_json(entry.at("aliases").array());
  found.continues = pairs_from_json(entry.at("continues").array());
  compare(graph + ": input ", bound.inputs, found.inputs, same, problems);
  compare(graph + ": output ", bound.outputs, found.outputs, same, problems);
  if (found.aliases != bound.aliases) {
    problems.push_back(graph + ": aliases must give every present cache the memory of its past one, in their order");
  }
  for (NamePairs* pairs : {&found.continues, &bound.continues}) std::sort(pairs->begin(), pairs->end());
  if (found.continues != bound.continues) {
    problems.push_back(graph + ": continues must pair what a call leaves with what the next one reads");
  }
  return found;
}

}  // namespace

GraphContract graph_contract(const std::string& graph, const ModelConfig& config) {
  GraphContract bound;
  bound.outputs = specs_of(graph, kOutputs, config, bound.continues);
  bound.inputs = specs_of(graph, kInputs, config, bound.continues);
  if (graph == names::kGraphHead) return bound;
  const auto carry = [&](const std::string& from, const std::string& to, const Shape& dims) {
    bound.inputs.push_back({to, DType::float32, dims});
    if (from != names::kNextHidden) bound.outputs.push_back({from, DType::float32, dims});
    bound.continues.emplace_back(from, to);
  };
  const bool iterates = config.iterated && graph != names::kGraphStep;
  for (const auto& [name, shape] : config.states) {
    carry(names::next_state(name), names::state(name), shape_of_tokens(kBatch, 1, shape));
    if (iterates) carry(names::next_iterate(name), names::iterate(name), shape_of_tokens(kBatch, kSeq, shape));
  }
  if (iterates) bound.outputs.push_back({names::kResidual, DType::float32, {kBatch}});
  for (std::size_t index = 0; index < config.caches.size(); ++index) {
    const CacheSpec& spec = config.caches[index];
    for (const auto& [present, past] :
         {std::pair(names::present_key_values_key(index), names::past_key_values_key(index)),
          std::pair(names::present_key_values_value(index), names::past_key_values_value(index))}) {
      bound.inputs.push_back({past, DType::float32, {kBatch, spec.heads, kCapacity, spec.head_dim}});
      bound.outputs.push_back({present, DType::float32, bound.inputs.back().dims});
      bound.aliases.emplace_back(present, past);
    }
  }
  return bound;
}

GraphContracts contracts_from_json(const JsonValue& contract, const JsonValue& targets, const ModelConfig& config) {
  Problems problems;
  GraphContracts contracts;
  for (const auto& [graph, entry] : contract.object().members()) {
    if (!is_word(config.iterated ? "step prefill prefill_pass head" : "step prefill head", graph)) {
      problems.push_back(in_quotes(graph) + " is no graph of this model");
    } else {
      contracts[graph] = contract_from_json(graph, entry, config, problems);
    }
  }
  for (const auto& [name, target] : targets.object().members()) {
    for (const auto& [graph, file] : target.at("graphs").object().members()) {
      if (contract.find(graph) != nullptr) continue;
      problems.push_back(in_quotes(graph) + " of " + in_quotes(name) + " is missing");
    }
  }
  refuse_problems(ErrorKind::bundle, "the manifest's contract is unusable", problems);
  return contracts;
}

std::vector<std::string> contract_problems(const GraphContract& contract, const Target& target,
                                           const std::string& graph, const Program& program) {
  const auto of_target = [&target](Specs specs) {
    for (TensorSpec& spec : specs) {
      if (spec.name.find("key_values.") != std::string::npos) spec.dtype = target.cache_dtype;
    }
    return specs;
  };
  const SameDim compatible = [](std::int64_t a, std::int64_t b) { return a == b || a < 0 || b < 0; };
  Problems problems;
  compare(graph + ": input ", of_target(contract.inputs), program.inputs(), compatible, problems);
  compare(graph + ": output ", of_target(contract.outputs), program.outputs(), compatible, problems);
  return problems;
}

void refuse_broken_contract(const Target& target, const std::vector<std::string>& problems) {
  refuse_problems(ErrorKind::contract, "the graphs of " + target.name + " break the contract", problems);
}

}  // namespace crt
