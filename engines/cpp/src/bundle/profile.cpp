#include "bundle/profile.hpp"

#include <algorithm>
#include <utility>

#include "bundle/message_text.hpp"
#include "bundle/problem_list.hpp"
#include "bundle/profile_check.hpp"
#include "crt_runtime/error.hpp"

namespace crt {
namespace {

std::map<std::string, std::string> files_of(const JsonValue& references) {
  std::map<std::string, std::string> files;
  for (const auto& [graph, file] : references.object().members()) files[graph] = file.string();
  return files;
}

std::optional<std::int64_t> optional_integer(const JsonValue* value) {
  return value == nullptr || value->is_null() ? std::nullopt : std::optional(value->integer());
}

OrtProfile ort_profile(const JsonValue* options) {
  OrtProfile profile;
  if (options == nullptr) return profile;
  if (const JsonValue* level = options->find("graph_optimization")) profile.graph_optimization = level->string();
  if (const JsonValue* spinning = options->find("spinning")) profile.spinning = spinning->boolean();
  if (const JsonValue* huge = options->find("huge_pages")) profile.huge_pages = huge->boolean();
  if (const JsonValue* mapped = options->find("mmap")) profile.mmap = mapped->boolean();
  if (const JsonValue* names = options->find("disabled_optimizers")) {
    for (const JsonValue& name : names->array()) profile.disabled_optimizers.push_back(name.string());
  }
  return profile;
}

PrefillMethod method_from(const std::string& name) {
  if (name == "steps") return PrefillMethod::steps;
  return name == "adaptive" ? PrefillMethod::adaptive : PrefillMethod::passes;
}

/// Bundles of earlier versions have none and take passes.
PrefillPlan prefill_plan(const JsonValue& entry, bool recurrent) {
  PrefillPlan plan;
  const JsonValue* given = entry.find("prefill");
  if (given == nullptr || !recurrent) return plan;
  plan.method = method_from(given->at("method").string());
  plan.chunk = optional_integer(&given->at("chunk"));
  plan.shortest = given->at("shortest").integer();
  plan.passes = given->at("passes").integer();
  const JsonValue& bound = given->at("residual_bound");
  if (bound.is_number()) plan.residual_bound = bound.number();
  if (plan.method == PrefillMethod::passes && plan.passes == optional_integer(&entry.at("unroll"))) {
    plan.passes = std::nullopt;  // which the unrolled graph makes in one call
  }
  return plan;
}

}  // namespace

Target target_from_json(const std::string& name, const JsonValue& entry, const ModelConfig& config,
                        const std::string& source) {
  const JsonValue& profile = entry.at("profile");
  const std::vector<std::string> problems = profile_problems(profile);
  if (!problems.empty()) throw Error(ErrorKind::bundle, problem_list("engine profile " + source, problems));
  Target target;
  target.name = name;
  target.runtime = profile.at("runtime").string();
  target.device = profile.at("device").string();
  target.precision = profile.at("precision").string();
  target.graphs = files_of(entry.at("graphs"));
  target.engines = files_of(entry.at("engines"));
  const std::optional<std::int64_t> capacity = optional_integer(&entry.at("capacity"));
  target.capacity = std::min(capacity.value_or(profile.at("capacity").integer()), config.max_position_embeddings);
  target.unroll = optional_integer(&entry.at("unroll"));
  target.cache_dtype = entry.at("cache_dtype").string() == "float16" ? DType::float16 : DType::float32;
  target.max_tokens = profile.at("seq").array()[2].integer();
  target.max_batch = profile.at("batch").array()[2].integer();
  target.threads = static_cast<int>(optional_integer(profile.find("threads")).value_or(0));
  const std::optional<std::int64_t> capability = optional_integer(profile.find("compute_capability"));
  if (capability) target.compute_capability = static_cast<int>(*capability);
  target.prefill = prefill_plan(entry, config.recurrent);
  if (target.runtime == "onnxruntime") target.ort = ort_profile(profile.find("options"));
  return target;
}

}  // namespace crt
