#include "bundle/bundle_files.hpp"

#include <algorithm>
#include <filesystem>
#include <set>
#include <utility>

#include "bundle/external_data.hpp"
#include "bundle/graph_contract.hpp"
#include "bundle/leftovers.hpp"
#include "bundle/manifest.hpp"
#include "bundle/message_text.hpp"
#include "bundle/model_config.hpp"
#include "bundle/problem_list.hpp"
#include "bundle/profile.hpp"
#include "bundle/schema.hpp"
#include "bundle/sha256.hpp"
#include "bundle/sidecar.hpp"
#include "crt_runtime/error.hpp"

namespace crt {
namespace {

namespace fs = std::filesystem;

constexpr char kAgain[] = "the bundle was changed after it was built; build it again or restore it from its source";
constexpr std::size_t kMaxSidecarBytes = std::size_t{16} << 20U;

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::bundle, message); }

/// The manifests that builds set aside while they replace the bundle; after a crash one is the only copy.
std::vector<std::string> set_aside(const std::string& folder) {
  std::vector<std::string> found;
  for (const Leftover& leftover : find_leftovers(folder)) {
    std::error_code problem;
    const fs::path path = fs::path(folder).parent_path() / leftover.file_name;
    if (!leftover.partial && fs::is_regular_file(path / kManifestName, problem)) found.push_back(path.string());
  }
  return found;
}

std::string unfinished_hint(const std::string& folder) {
  std::vector<std::string> unfinished;
  for (const Leftover& leftover : find_leftovers(folder)) {
    if (leftover.partial) unfinished.push_back(leftover.file_name);
  }
  if (unfinished.empty()) return "";
  return "; an unfinished build is beside it (" + joined(unfinished) + "): let it finish or build again";
}

/// Say why there is no bundle in folder; returns if it is a folder with something in it.
void check_folder(const std::string& folder) {
  std::error_code problem;
  const fs::file_status status = fs::status(folder, problem);
  if (fs::exists(status) && !fs::is_directory(status)) refuse("expected a bundle folder, found a file: " + folder);
  const bool is_folder = fs::is_directory(status);
  if (is_folder && !fs::is_empty(folder, problem)) return;
  const std::vector<std::string> previous = set_aside(folder);
  if (!previous.empty()) {
    refuse("the last build of " + folder + " was interrupted and the old bundle is set aside: open it once with " +
           kToolName + ", or rename " + previous.back() + " to " + fs::path(folder).filename().string() + " by hand");
  }
  if (!is_folder) refuse("no such bundle folder: " + folder + unfinished_hint(folder));
}

Manifest manifest_of(const std::string& folder) {
  try {
    return read_manifest(folder);
  } catch (const Error& error) {
    if (error.kind() != ErrorKind::bundle) throw;
  }
  const FolderLock lock(fs::path(folder).parent_path().string());  // a build may have been between its two renames
  check_folder(folder);
  return read_manifest(folder);
}

ModelConfig config_of(const std::string& folder, const JsonValue& config) {
  try {
    return model_config_from_json(config);
  } catch (const Error& error) {
    refuse(folder + ": the manifest's config is unusable: " + error.what());
  }
}

}  // namespace

BundleFiles BundleFiles::open(const std::string& path, bool allow_unvalidated) {
  if (path.find('\0') != std::string::npos) refuse("a path holds no NUL character, found " + in_quotes(path));
  BundleFiles files;
  files.path_ = real_path(path);
  const std::string& folder = files.path_;
  if (const std::optional<Leftover> leftover = parse_leftover(folder)) {
    refuse(folder + " is what an interrupted or running build left behind, not a bundle: open " +
           (fs::path(folder).parent_path() / leftover->name).string() +
           ", or build it again (that removes leftovers)");
  }
  const Manifest manifest = manifest_of(folder);
  const JsonValue& content = manifest.content;
  if (!content.at("validated").boolean() && !allow_unvalidated) {
    refuse(folder + " is not validated: its agreement with PyTorch was never shown; build it without --unvalidated, "
                    "or allow an unvalidated bundle if that is what you want");
  }
  files.identity_ = manifest.identity;
  files.checkpoint_ = content.at("checkpoint").at("sha256").string();
  files.validated_ = content.at("validated").boolean();
  files.config_ = config_of(folder, content.at("config"));
  files.contracts_ = graph_contracts(files.config_);
  files.take_tables(content);
  return files;
}

void BundleFiles::take_tables(const JsonValue& manifest) {
  for (const auto& [name, entry] : manifest.at("files").object().members()) {
    files_[name] = {static_cast<std::uint64_t>(entry.at("size").integer()), entry.at("sha256").string()};
  }
  for (const JsonValue& graph : manifest.at("graphs").array()) {
    std::vector<std::string>& weights = weights_of_graph_[graph.at("file").string()];
    if (graph.at("weights").is_string()) weights.push_back(graph.at("weights").string());
  }
  for (const auto& [name, entry] : manifest.at("targets").object().members()) {
    target_names_.push_back(name);
    try {
      targets_[name].target = target_from_json(name, entry, config_, name + " of " + path_);
    } catch (const Error& error) {
      targets_[name].problem = error.what();
    }
  }
}

const Target& BundleFiles::target(const std::string& name) const {
  const auto found = targets_.find(name);
  if (found == targets_.end()) {
    throw Error(ErrorKind::input, "unknown target " + in_quotes(name) + ": " + path_ + " was built for " +
                                      (target_names_.empty() ? "(none)" : joined(target_names_)));
  }
  if (!found->second.target) refuse(found->second.problem);
  return *found->second.target;
}

const GraphContract& BundleFiles::contract(const std::string& graph) const {
  const auto found = contracts_.find(graph);
  if (found == contracts_.end()) {
    throw Error(ErrorKind::unsupported, std::string("a ") +
                                            (config_.recurrent ? "context_ready_transformer" : "transformer") +
                                            " model has no " + graph + " graph");
  }
  return found->second;
}

std::string BundleFiles::file(const std::string& name) {
  const std::optional<std::string> problem = problem_of(name);
  if (problem) {
    std::vector<std::string> names;
    for (const auto& listed : files_) names.push_back(listed.first);
    const std::optional<std::string> close = files_.count(name) == 0 ? close_match(name, names) : std::nullopt;
    refuse(in_quotes(name) + " in " + path_ + " " + *problem +
           (close ? " (did you mean " + in_quotes(*close) + "?)" : "") + "; " + kAgain);
  }
  return path_ + "/" + name;
}

std::string BundleFiles::graph(const std::string& name) {
  const auto entry = weights_of_graph_.find(name);
  const auto uses = [&name](const auto& target) {
    if (!target.second.target) return false;
    const auto& graphs = target.second.target->graphs;
    return std::any_of(graphs.begin(), graphs.end(), [&name](const auto& graph) { return graph.second == name; });
  };
  if (entry == weights_of_graph_.end() && std::none_of(targets_.begin(), targets_.end(), uses)) {
    std::vector<std::string> known;
    for (const auto& graph : weights_of_graph_) known.push_back(graph.first);
    refuse(in_quotes(name) + " is not a graph of " + path_ + "; its graphs are " +
           (known.empty() ? "(none)" : joined(known)));
  }
  const std::string path = file(name);
  if (entry != weights_of_graph_.end()) {
    for (const std::string& weights : entry->second) file(weights);
  }
  const auto scanned = scanned_.find(name);
  if (scanned == scanned_.end() || scanned->second != verified_.at(name)) {
    const std::vector<std::string> problems = external_problems(name);
    if (!problems.empty()) refuse(problem_list("the external data of " + in_quotes(name) + " in " + path_, problems));
    scanned_[name] = verified_.at(name);
  }
  return path;
}

EngineSidecar BundleFiles::sidecar(const std::string& engine_file) {
  const std::string ending = ".engine";
  const std::size_t stem = engine_file.size() - std::min(engine_file.size(), ending.size());
  if (engine_file.substr(stem) != ending) {
    refuse("the engine " + in_quotes(engine_file) + " of " + path_ + " has no sidecar: its name must end in " + ending);
  }
  const std::string name = engine_file.substr(0, stem) + ".json";
  const std::string path = file(name);
  try {
    const std::optional<std::string> content = read_file(path, kMaxSidecarBytes);
    if (!content) refuse(path + " has more than " + std::to_string(kMaxSidecarBytes) + " bytes; a sidecar is small");
    // the very bytes that are read count, not those that were hashed a moment ago
    if (sha256_hex(content->data(), content->size()) != files_.at(name).sha256) {
      refuse(path + " changed while it was read; " + kAgain);
    }
    return sidecar_from_json(*content, path);
  } catch (const SystemError& error) {
    refuse("cannot read " + path + ": " + error.what());
  }
}

std::optional<std::string> BundleFiles::problem_of(const std::string& name) {
  const auto entry = files_.find(name);
  if (entry == files_.end()) return "is not listed in the manifest";
  if (std::optional<std::string> problem = name_problem(name)) return problem;
  if (std::optional<std::string> problem = file_problem(path_, name)) return problem;
  const std::string path = path_ + "/" + name;
  try {
    const FileState state = file_state(path);
    const auto known = verified_.find(name);
    if (known != verified_.end() && known->second == state) return std::nullopt;
    if (state.size != entry->second.size) {
      return "has " + std::to_string(state.size) + " bytes, the manifest says " + std::to_string(entry->second.size);
    }
    const HashedFile hashed = hash_file(path);
    if (hashed.sha256 != entry->second.sha256) {
      return "has SHA-256 " + hashed.sha256 + ", the manifest says " + entry->second.sha256;
    }
    verified_[name] = hashed.state;
  } catch (const SystemError& error) {
    return "cannot be read (" + std::string(error.what()) + ")";
  }
  return std::nullopt;
}

std::vector<std::string> BundleFiles::external_problems(const std::string& name) {
  std::vector<ExternalTensor> tensors;
  try {
    tensors = external_tensors(path_ + "/" + name);
  } catch (const Error& error) {
    return {error.what()};
  }
  const std::size_t slash = name.rfind('/');
  // ONNX: a location is relative to the folder of the graph file
  const std::string folder = slash == std::string::npos ? "" : name.substr(0, slash + 1);
  std::vector<std::string> problems;
  std::set<std::string> seen;
  for (const ExternalTensor& tensor : tensors) {
    if (!seen.insert(tensor.location).second) continue;
    std::optional<std::string> problem = name_problem(tensor.location);
    if (!problem) problem = problem_of(folder + tensor.location);
    if (problem) {
      problems.push_back("tensor " + in_quotes(tensor.tensor) + " points at " + in_quotes(tensor.location, 200) +
                         ", which " + *problem);
    }
  }
  return problems;
}

}  // namespace crt
