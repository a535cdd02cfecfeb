#include "bundle/graph_contract.hpp"

#include <utility>

#include "engine/tensor_names.hpp"

namespace crt {
namespace {

constexpr std::int64_t kDynamic = -1;  // batch, seq and capacity

/// The entries of graphs/*.toml; each function is one table there.
class Definitions {
 public:
  explicit Definitions(const ModelConfig& config) : config_(config) {}

  GraphContract step() const {
    GraphContract graph;
    graph.inputs = {{names::kInputIds, DType::int64, {kDynamic, 1}}, {names::kPosition, DType::int64, {kDynamic}}};
    add_recurrent(graph.inputs, state(names::kState));
    graph.outputs = next_token();
    add_recurrent(graph.outputs, state(names::kNextState));
    add_caches(graph);
    return graph;
  }
  /// prefill and prefill_pass, which differ in the number of passes only
  GraphContract prefill() const {
    GraphContract graph;
    graph.inputs = {{names::kInputIds, DType::int64, {kDynamic, kDynamic}},
                    {names::kLength, DType::int64, {kDynamic}},
                    {names::kPosition, DType::int64, {kDynamic}}};
    add_recurrent(graph.inputs, state(names::kState));
    add_recurrent(graph.inputs, hidden(names::kHidden));
    graph.outputs = next_token();
    add_recurrent(graph.outputs, state(names::kNextState));
    graph.outputs.push_back(hidden(names::kNextHidden));
    add_recurrent(graph.outputs, {names::kResidual, DType::float32, {kDynamic}});
    add_caches(graph);
    return graph;
  }
  GraphContract head() const {
    GraphContract graph;
    graph.inputs = {hidden(names::kHidden)};
    graph.outputs = {{names::kLogits, DType::float32, {kDynamic, kDynamic, config_.vocab}}};
    return graph;
  }

 private:
  TensorSpec state(const char* name) const { return {name, DType::float32, {kDynamic, 1, config_.hidden}}; }
  TensorSpec hidden(const char* name) const { return {name, DType::float32, {kDynamic, kDynamic, config_.hidden}}; }
  TensorSpec cache(std::string name) const {
    return {std::move(name), DType::float32, {kDynamic, config_.heads, kDynamic, config_.head_dim}};
  }
  std::vector<TensorSpec> next_token() const {
    return {{names::kLogits, DType::float32, {kDynamic, config_.vocab}},
            {names::kNextToken, DType::int64, {kDynamic, 1}},
            {names::kNextPosition, DType::int64, {kDynamic}}};
  }
  void add_recurrent(std::vector<TensorSpec>& side, TensorSpec spec) const {
    if (config_.recurrent) side.push_back(std::move(spec));
  }
  void add_caches(GraphContract& graph) const {
    for (std::int64_t layer = 0; layer < config_.layers; ++layer) {
      for (auto [present, past] :
           {std::pair(names::present_key_values_key(layer), names::past_key_values_key(layer)),
            std::pair(names::present_key_values_value(layer), names::past_key_values_value(layer))}) {
        graph.inputs.push_back(cache(past));
        graph.outputs.push_back(cache(present));
        graph.aliases.emplace_back(present, past);
      }
    }
  }

  const ModelConfig& config_;
};

}  // namespace

std::map<std::string, GraphContract> graph_contracts(const ModelConfig& config) {
  const Definitions definitions(config);
  std::map<std::string, GraphContract> graphs;
  graphs[names::kGraphStep] = definitions.step();
  graphs[names::kGraphPrefill] = definitions.prefill();
  graphs[names::kGraphHead] = definitions.head();
  if (config.recurrent) graphs[names::kGraphPrefillPass] = definitions.prefill();
  return graphs;
}

}  // namespace crt
