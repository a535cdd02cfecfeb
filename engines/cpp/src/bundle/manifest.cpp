#include "bundle/manifest.hpp"

#include <algorithm>
#include <cerrno>
#include <memory>
#include <optional>
#include <vector>

#include "bundle/held_files.hpp"
#include "bundle/integrity.hpp"
#include "bundle/json_rules.hpp"
#include "bundle/model_config.hpp"
#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

constexpr std::size_t kMaxManifestBytes = std::size_t{64} << 20U;
constexpr char kAgain[] = "the bundle was changed or is incomplete; build it again";

using Problems = std::vector<std::string>;

const MemberRules kTopRules{
    {"tool", kObject},       {"libraries", kObject}, {"validated", kBoolean}, {"config", kObject},
    {"checkpoint", kObject}, {"options", kObject},   {"contract", kObject},   {"graphs", kList},
    {"targets", kObject},    {"files", kObject},     {"parity", kObject | kNull}, {"quantization", kObject},
    {"model", kObject},
};
const MemberRules kToolRules{{"name", kText, 0, 0, kToolName}, {"version", kText}};
const MemberRules kCheckpointRules{{"sha256", kText}};
const MemberRules kContractRules{{"inputs", kList}, {"outputs", kList}, {"aliases", kList}, {"continues", kList}};
const MemberRules kTensorRules{{"name", kText}, {"dtype", kText}, {"dims", kList}};
const MemberRules kFileRules{{"size", kInteger, 0}, {"sha256", kText}};
const MemberRules kGraphRules{
    {"file", kText},
    {"graph", kText},
    {"precision", kText},
    {"unroll", kInteger | kNull},
    {"weights", kText | kNull},
    {"quantized_matmuls", kInteger},
    {"roles", kList},
};
const MemberRules kTargetRules{
    {"profile", kObject},
    {"graphs", kObject},
    {"engines", kObject},
    {"capacity", kInteger, 1},
    {"unroll", kInteger | kNull, 1},
    {"cache_dtype", kText, 0, 0, "float32 float16"},
    {"prefill", kObject},
};
const MemberRules kPrefillRules{
    {"method", kText, 0, 0, "steps passes adaptive"},
    {"passes", kInteger, 1},
    {"chunk", kInteger | kNull, 1},
    {"shortest", kInteger, 1},
    {"residual_bound", kNumber | kNull, kAboveZero},
    {"perplexity_gap", kNumber | kNull, 0},
};

bool is_name_pair(const JsonValue& pair) {
  return pair.is_array() && pair.array().size() == 2 && pair.array()[0].is_string() && pair.array()[1].is_string();
}

void check_contract(Problems& problems, const JsonValue& contract) {
  for (const auto& [graph, spec] : contract.object().members()) {
    const std::string where = "contract[" + in_quotes(graph) + "]";
    if (!check_rules(problems, where, spec, kContractRules)) continue;
    for (const char* side : {"inputs", "outputs"}) {
      const JsonArray& tensors = spec.at(side).array();
      for (std::size_t i = 0; i < tensors.size(); ++i) {
        check_rules(problems, where + "." + side + "[" + std::to_string(i) + "]", tensors[i], kTensorRules);
      }
    }
    for (const char* key : {"aliases", "continues"}) {
      const JsonArray& pairs = spec.at(key).array();
      if (std::all_of(pairs.begin(), pairs.end(), is_name_pair)) continue;
      problems.push_back(where + "." + key + " must be pairs of names");
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
    const std::string where = "files[" + in_quotes(name) + "]";
    std::optional<std::string> reason = name_problem(name);
    if (!reason && name == kManifestName) reason = "is the manifest, which cannot list itself";
    if (reason) problems.push_back(where + ": the path " + *reason);
    if (!check_rules(problems, where, entry, kFileRules)) continue;
    const std::string& digest = entry.at("sha256").string();
    if (!is_sha256(digest)) {
      problems.push_back(where + ": 'sha256' must be 64 lower-case hex digits, found " + in_quotes(digest, 80));
    }
  }
}

void check_reference(Problems& problems, const std::string& where, const std::string& key, const JsonValue& name,
                     const JsonValue& files) {
  if (name.is_string() && files.find(name.string()) != nullptr) return;
  problems.push_back(where + "[" + in_quotes(key) + "] is " + shown(name) + ", which is not listed in 'files'");
}

bool is_role(const JsonValue& value) {
  return value.is_string() && is_word("session compiler interchange validation", value.string());
}

void check_graphs(Problems& problems, const JsonValue& graphs, const JsonValue& files) {
  for (std::size_t i = 0; i < graphs.array().size(); ++i) {
    const JsonValue& graph = graphs.array()[i];
    const std::string where = "graphs[" + std::to_string(i) + "]";
    if (!check_rules(problems, where, graph, kGraphRules)) continue;
    check_reference(problems, where, "file", graph.at("file"), files);
    if (given(graph, "weights") != nullptr) check_reference(problems, where, "weights", graph.at("weights"), files);
    const auto& roles = graph.at("roles").array();
    if (roles.empty() || !std::all_of(roles.begin(), roles.end(), is_role)) {
      problems.push_back(where + ": 'roles' must be some of session, compiler, interchange, validation");
    }
  }
}

void check_targets(Problems& problems, const JsonValue& targets, const JsonValue& files) {
  for (const auto& [name, target] : targets.object().members()) {
    const std::string where = "targets[" + in_quotes(name) + "]";
    if (!check_rules(problems, where, target, kTargetRules)) continue;
    const JsonValue& plan = target.at("prefill");
    if (check_rules(problems, where + ".prefill", plan, kPrefillRules) && plan.at("method").string() == "adaptive" &&
        given(plan, "residual_bound") == nullptr) {
      problems.push_back(where + ".prefill: 'adaptive' needs a 'residual_bound'");
    }
    for (const char* kind : {"graphs", "engines"}) {
      for (const auto& [key, file] : target.at(kind).object().members()) {
        check_reference(problems, where + "." + kind, key, file, files);
      }
    }
  }
}

/// Every way in which a parsed manifest breaks the schema.
Problems schema_problems(const JsonValue& manifest) {
  Problems problems = rule_problems("the manifest", manifest, kTopRules);
  if (!problems.empty()) return problems;
  const JsonValue& files = manifest.at("files");
  check_rules(problems, "tool", manifest.at("tool"), kToolRules);
  check_rules(problems, "checkpoint", manifest.at("checkpoint"), kCheckpointRules);
  const Problems of_model = model_problems(manifest.at("model"));
  problems.insert(problems.end(), of_model.begin(), of_model.end());
  check_contract(problems, manifest.at("contract"));
  check_files(problems, files);
  check_graphs(problems, manifest.at("graphs"), files);
  check_targets(problems, manifest.at("targets"), files);
  for (const auto& [precision, plan] : manifest.at("quantization").object().members()) {
    check_reference(problems, "quantization", precision, plan, files);
  }
  const JsonValue* passed = manifest.at("parity").find("passed");
  if (manifest.at("validated").boolean() && !(passed != nullptr && passed->is_boolean() && passed->boolean())) {
    problems.emplace_back("validated is true, but there is no parity report that passed");
  }
  return problems;
}

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::bundle, message); }

std::string read(const HeldFolder& folder, const std::string& path) {
  try {
    const std::shared_ptr<const RegularFile> file = folder.open_file(kManifestName);
    std::optional<std::string> content = read_file(*file, kMaxManifestBytes);
    if (!content) {
      refuse(path + " has " + std::to_string(file->state().size) + " bytes; a manifest has at most " +
             std::to_string(kMaxManifestBytes));
    }
    return *std::move(content);
  } catch (const SystemError& error) {
    if (error.number() == ENOENT) {
      refuse(folder.path() + " is not a bundle: it has no " + kManifestName + "; build one with 'crt-export build'");
    }
    refuse("cannot read " + path + ": " + error.what() + " (expected a regular file, not a link)");
  }
}

JsonValue parse(const std::string& path, const std::string& content) {
  std::optional<JsonValue> manifest;
  try {
    manifest = parse_json(content);
  } catch (const JsonError& error) {
    refuse(path + " " + error.what() + ": " + kAgain);
  }
  if (!manifest->is_object()) refuse(path + " must hold a JSON object, found " + shown(*manifest) + ": " + kAgain);
  return *std::move(manifest);
}

void check_version(const std::string& path, const JsonValue& manifest) {
  const JsonValue* version = manifest.find("schema_version");
  if (version == nullptr || !version->is_integer() || version->integer() < 1) {
    refuse(path + " is not a manifest of " + kToolName + ": expected an integer 'schema_version' of 1 or more, found " +
           (version == nullptr ? "nothing" : shown(*version)));
  }
  if (version->integer() > kSchemaVersion) {
    refuse(path + " has schema version " + shown(*version) + "; this " + kToolName + " reads up to version " +
           std::to_string(kSchemaVersion) + ": upgrade " + kToolName +
           ", or build the bundle again with this version");
  }
}

}  // namespace

Manifest read_manifest(const HeldFolder& folder) {
  const std::string path = folder.path() + "/" + kManifestName;
  const std::string content = read(folder, path);
  Manifest manifest;
  manifest.content = parse(path, content);
  check_version(path, manifest.content);
  if (const std::optional<std::string> damage = integrity_problem(manifest.content)) {
    refuse(path + " was changed after it was written: " + *damage + "; restore the bundle or build it again");
  }
  const Problems problems = schema_problems(manifest.content);
  if (!problems.empty()) {
    refuse(problem_list(path + " breaks schema version " + std::to_string(kSchemaVersion), problems));
  }
  manifest.identity = sha256_hex(content.data(), content.size());
  return manifest;
}

}  // namespace crt
