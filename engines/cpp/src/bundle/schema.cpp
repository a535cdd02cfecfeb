#include "bundle/schema.hpp"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>

#include "bundle/message_text.hpp"
#include "bundle/paths.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;

// What a field may hold, as bits.
constexpr unsigned kObject = 1, kList = 2, kText = 4, kInteger = 8, kBoolean = 16, kNull = 32, kFraction = 64;
constexpr unsigned kNumber = kInteger | kFraction;

struct FieldRule {
  const char* name;
  unsigned types;
};
using FieldRules = std::initializer_list<FieldRule>;

const FieldRules kTopFields{
    {"tool", kObject},    {"libraries", kObject}, {"validated", kBoolean}, {"config", kObject},
    {"checkpoint", kObject}, {"options", kObject}, {"contract", kObject},  {"graphs", kList},
    {"quantization", kObject}, {"targets", kObject}, {"files", kObject}, {"parity", kObject | kNull},
};
const FieldRules kGraphFields{
    {"file", kText},
    {"graph", kText},
    {"precision", kText},
    {"unroll", kInteger | kNull},
    {"weights", kText | kNull},
    {"quantized_matmuls", kInteger},
};
const FieldRules kTargetFields{
    {"profile", kObject},         {"graphs", kObject},    {"engines", kObject},         {"capacity", kInteger | kNull},
    {"unroll", kInteger | kNull}, {"cache_dtype", kText},
};
const FieldRules kPrefillFields{
    {"method", kText},      {"passes", kInteger},
    {"chunk", kInteger | kNull}, {"shortest", kInteger},
    {"residual_bound", kNumber | kNull}, {"perplexity_gap", kNumber | kNull},
};
const FieldRules kContractFields{{"inputs", kList}, {"outputs", kList}, {"aliases", kList}};
const FieldRules kTensorFields{{"name", kText}, {"dtype", kText}, {"dims", kList}};
const FieldRules kFileFields{{"size", kInteger}, {"sha256", kText}};

unsigned type_of(const JsonValue& value) {
  if (value.is_object()) return kObject;
  if (value.is_array()) return kList;
  if (value.is_string()) return kText;
  if (value.is_integer()) return kInteger;
  if (value.is_boolean()) return kBoolean;
  return value.is_null() ? kNull : kFraction;
}

std::string type_names(unsigned types) {
  const std::array<std::pair<unsigned, const char*>, 7> names{{{kObject, "an object"},
                                                               {kList, "a list"},
                                                               {kText, "a string"},
                                                               {kFraction, "a number"},
                                                               {kInteger, "an integer"},
                                                               {kBoolean, "true or false"},
                                                               {kNull, "null"}}};
  Problems parts;
  for (const auto& [type, name] : names) {
    if ((types & type) != 0) parts.emplace_back(name);
  }
  return joined(parts, " or ");
}

void append(Problems& problems, Problems more) {
  problems.insert(problems.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

Problems field_problems(const std::string& where, const JsonValue& value, const FieldRules& fields) {
  if (!value.is_object()) return {where + " must be an object, found " + shown(value)};
  Problems problems;
  for (const FieldRule& field : fields) {
    if (value.find(field.name) == nullptr) problems.push_back(where + " lacks " + in_quotes(field.name));
  }
  for (const FieldRule& field : fields) {
    const JsonValue* found = value.find(field.name);
    if (found != nullptr && (type_of(*found) & field.types) == 0) {
      problems.push_back(where + ": " + in_quotes(field.name) + " must be " + type_names(field.types) + ", found " +
                         shown(*found));
    }
  }
  return problems;
}

/// As field_problems, added to problems; true if there are none.
bool check_fields(Problems& problems, const std::string& where, const JsonValue& value, const FieldRules& fields) {
  Problems broken = field_problems(where, value, fields);
  const bool sound = broken.empty();
  append(problems, std::move(broken));
  return sound;
}

void check_alias(Problems& problems, const std::string& where, const JsonValue& pair) {
  const bool sound = pair.is_array() && pair.array().size() == 2 && pair.array()[0].is_string() &&
                     pair.array()[1].is_string();
  if (!sound) problems.push_back(where + " must be a pair of names, found " + shown(pair));
}

void check_contract(Problems& problems, const JsonValue& contract) {
  for (const auto& [graph, spec] : contract.object().members()) {
    const std::string where = "contract[" + in_quotes(graph) + "]";
    if (!check_fields(problems, where, spec, kContractFields)) continue;
    for (const char* side : {"inputs", "outputs"}) {
      const JsonArray& tensors = spec.at(side).array();
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        check_fields(problems, where + "." + side + "[" + std::to_string(i) + "]", tensors[i], kTensorFields);
      }
    }
    const JsonArray& aliases = spec.at("aliases").array();
    for (std::size_t i = 0; i < aliases.size(); ++i) {
      check_alias(problems, where + ".aliases[" + std::to_string(i) + "]", aliases[i]);
    }
  }
}

bool is_sha256(const std::string& text) {
  return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

void check_files(Problems& problems, const JsonValue& files) {
  std::vector<std::string> names;
  for (const auto& listed : files.object().members()) names.push_back(listed.first);
  for (const std::string& problem : collision_problems(names)) problems.push_back("files: " + problem);
  for (const auto& [name, entry] : files.object().members()) {
    const std::string where = "files[" + in_quotes(name, 200) + "]";
    std::optional<std::string> reason = name_problem(name);
    if (!reason && name == kManifestName) reason = "is the manifest, which cannot list itself";
    if (reason) problems.push_back(where + ": the path " + *reason);
    if (!check_fields(problems, where, entry, kFileFields)) continue;
    const std::int64_t size = entry.at("size").integer();
    if (size < 0) problems.push_back(where + ": 'size' must be 0 or more, found " + std::to_string(size));
    const std::string& digest = entry.at("sha256").string();
    if (!is_sha256(digest)) {
      problems.push_back(where + ": 'sha256' must be 64 lower-case hex digits, found " + in_quotes(digest, 80));
    }
  }
}

void check_reference(Problems& problems, const std::string& where, const std::string& key, const JsonValue& name,
                     const JsonValue& files) {
  const std::string entry = where + "[" + in_quotes(key) + "]";
  if (!name.is_string()) {
    problems.push_back(entry + " must be a file name, found " + shown(name));
  } else if (files.find(name.string()) == nullptr) {
    problems.push_back(entry + " is " + in_quotes(name.string()) + ", which is not listed in 'files'");
  }
}

void check_graphs(Problems& problems, const JsonValue& graphs, const JsonValue& files) {
  for (std::size_t i = 0; i < graphs.array().size(); ++i) {
    const JsonValue& graph = graphs.array()[i];
    const std::string where = "graphs[" + std::to_string(i) + "]";
    if (!check_fields(problems, where, graph, kGraphFields)) continue;
    for (const char* key : {"file", "weights"}) {
      if (!graph.at(key).is_null()) check_reference(problems, where, key, graph.at(key), files);
    }
  }
}

void check_prefill(Problems& problems, const std::string& where, const JsonValue& plan) {
  if (!check_fields(problems, where, plan, kPrefillFields)) return;
  const std::string& method = plan.at("method").string();
  if (method != "steps" && method != "passes" && method != "adaptive") {
    problems.push_back(where + ": 'method' must be one of steps, passes, adaptive, found " + in_quotes(method, 60));
  }
  for (const char* key : {"passes", "chunk", "shortest"}) {
    const JsonValue& value = plan.at(key);
    if (value.is_integer() && value.integer() < 1) {
      problems.push_back(where + ": " + in_quotes(key) + " must be 1 or more, found " + shown(value));
    }
  }
  const JsonValue& bound = plan.at("residual_bound");
  if (bound.is_number() && !(bound.number() > 0.0)) {
    problems.push_back(where + ": 'residual_bound' must be a number above 0, found " + shown(bound));
  }
  const JsonValue& gap = plan.at("perplexity_gap");
  if (gap.is_number() && !(gap.number() >= 0.0)) {
    problems.push_back(where + ": 'perplexity_gap' must be a number of at least 0, found " + shown(gap));
  }
  if (method == "adaptive" && bound.is_null()) {
    problems.push_back(where + ": 'adaptive' needs a 'residual_bound'");
  }
}

void check_target_values(Problems& problems, const std::string& where, const JsonValue& target) {
  for (const char* key : {"capacity", "unroll"}) {
    const JsonValue& value = target.at(key);
    if (value.is_integer() && value.integer() < 1) {
      problems.push_back(where + ": " + in_quotes(key) + " must be 1 or more, found " + shown(value));
    }
  }
  const std::string& dtype = target.at("cache_dtype").string();
  if (dtype != "float32" && dtype != "float16") {
    problems.push_back(where + ": 'cache_dtype' must be 'float32' or 'float16', found " + in_quotes(dtype, 60));
  }
  const JsonValue* prefill = target.find("prefill");  // bundles of earlier versions have none
  if (prefill != nullptr) check_prefill(problems, where + ".prefill", *prefill);
}

void check_targets(Problems& problems, const JsonValue& targets, const JsonValue& files) {
  for (const auto& [name, target] : targets.object().members()) {
    const std::string where = "targets[" + in_quotes(name) + "]";
    if (!check_fields(problems, where, target, kTargetFields)) continue;
    check_target_values(problems, where, target);
    for (const char* kind : {"graphs", "engines"}) {
      for (const auto& [key, file] : target.at(kind).object().members()) {
        check_reference(problems, where + "." + kind, key, file, files);
      }
    }
  }
}

bool parity_passed(const JsonValue& parity) {
  const JsonValue* passed = parity.find("passed");
  return passed != nullptr && passed->is_boolean() && passed->boolean();
}

}  // namespace

std::vector<std::string> manifest_problems(const JsonValue& manifest) {
  Problems problems = field_problems("the manifest", manifest, kTopFields);
  if (!problems.empty()) return problems;
  const JsonValue& tool = manifest.at("tool");
  const JsonValue* name = tool.find("name");
  if (name == nullptr || !name->is_string() || name->string() != kToolName) {
    problems.push_back("tool.name must be " + in_quotes(kToolName) + ", found " +
                       (name == nullptr ? "None" : shown(*name)));
  }
  check_fields(problems, "tool", tool, {{"version", kText}});
  check_fields(problems, "checkpoint", manifest.at("checkpoint"), {{"sha256", kText}});
  const JsonValue& files = manifest.at("files");
  check_contract(problems, manifest.at("contract"));
  check_files(problems, files);
  check_graphs(problems, manifest.at("graphs"), files);
  for (const auto& [precision, plan] : manifest.at("quantization").object().members()) {
    check_reference(problems, "quantization", precision, plan, files);
  }
  check_targets(problems, manifest.at("targets"), files);
  if (manifest.at("validated").boolean() && !parity_passed(manifest.at("parity"))) {
    problems.emplace_back("validated is true, but there is no parity report that passed");
  }
  return problems;
}

}  // namespace crt
