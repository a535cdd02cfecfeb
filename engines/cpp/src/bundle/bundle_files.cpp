#include "bundle/bundle_files.hpp"

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <set>
#include <string_view>
#include <utility>

#include "bundle/external_data.hpp"
#include "bundle/integrity.hpp"
#include "bundle/manifest.hpp"
#include "bundle/model_config.hpp"
#include "bundle/recovery.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

namespace fs = std::filesystem;

constexpr char kAgain[] = "the bundle was changed after it was built; build it again or restore it from its source";
constexpr std::size_t kMaxGraphBytes = std::size_t{2} << 30U;  // what protobuf can hold
constexpr std::string_view kOnnx = ".onnx";

/// The folder of a file of the bundle, with its slash. ONNX: a location is relative to the folder of the graph file.
std::string folder_of(const std::string& name) { return name.substr(0, name.rfind('/') + 1); }

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::bundle, message); }

/// The manifests that builds set aside while they replace the bundle; after a crash one is the only copy.
std::vector<std::string> set_aside(const std::string& folder) {
  std::vector<std::string> found;
  for (const AbandonedFolder& abandoned : find_abandoned(folder)) {
    std::error_code problem;
    const fs::path path = fs::path(folder).parent_path() / abandoned.file_name;
    if (!abandoned.partial && fs::is_regular_file(path / kManifestName, problem)) found.push_back(path.string());
  }
  return found;
}

std::string unfinished_hint(const std::string& folder) {
  std::vector<std::string> unfinished;
  for (const AbandonedFolder& abandoned : find_abandoned(folder)) {
    if (abandoned.partial) unfinished.push_back(abandoned.file_name);
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

/// Runs out of descriptors, which is no fault of the bundle.
bool is_out_of_descriptors(const SystemError& error) { return error.number() == EMFILE || error.number() == ENFILE; }

/// Throws what `read` throws, with the folder in front.
template <typename Read>
auto of_manifest(const std::string& folder, const Read& read) {
  try {
    return read();
  } catch (const Error& error) {
    refuse(folder + ": " + error.what());
  }
}

}  // namespace

BundleFiles BundleFiles::open(const std::string& path, bool allow_unvalidated, const std::string& identity) {
  if (path.find('\0') != std::string::npos) refuse("a path holds no NUL character, found " + in_quotes(path));
  const std::string folder = real_path(path);
  if (const std::optional<AbandonedFolder> abandoned = parse_abandoned(folder)) {
    refuse(folder + " is what an interrupted or running build left behind, not a bundle: open " +
           (fs::path(folder).parent_path() / abandoned->name).string() +
           ", or build it again (that removes leftovers)");
  }
  const auto opened = [&folder]() -> std::optional<BundleFiles> {
    try {
      bool incomplete = false;
      BundleFiles files = read(folder, &incomplete);
      if (!incomplete || !files.folder_->exchanged()) return files;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::bundle) throw;
    }
    return std::nullopt;
  };
  std::optional<BundleFiles> files = opened();
  if (!files) {
    // A build may have been between its two renames, or removed the folder just then.
    const FolderLock lock(fs::path(folder).parent_path().string());
    check_folder(folder);
    bool incomplete = false;
    files = read(folder, &incomplete);
  }
  if (!files->files_as_written_) files->prove_files();
  if (!identity.empty() && files->identity_ != identity) {
    refuse(folder + " is another bundle: expected the identity " + in_quotes(identity, 80) + " (SHA-256 of " +
           kManifestName + "), found " + files->identity_ +
           "; get the bundle that was meant, or expect this one if you trust it");
  }
  if (!files->validated_ && !allow_unvalidated) {
    refuse(folder + " is not validated: its agreement with PyTorch was never shown; build it without --unvalidated, "
                    "or allow an unvalidated bundle if that is what you want");
  }
  return *std::move(files);
}

BundleFiles BundleFiles::read(const std::string& path, bool* incomplete) {
  std::shared_ptr<const HeldFolder> folder;
  try {
    folder = std::make_shared<HeldFolder>(path);
  } catch (const SystemError& error) {
    refuse("cannot open the bundle folder " + path + ": " + error.what());
  }
  const Manifest manifest = read_manifest(*folder);
  BundleFiles files(std::move(folder));
  const JsonValue& content = manifest.content;
  files.identity_ = manifest.identity;
  files.checkpoint_ = content.at("checkpoint").at("sha256").string();
  files.validated_ = content.at("validated").boolean();
  files.files_as_written_ = files_are_as_written(content);
  files.config_ = of_manifest(path, [&] { return model_config_from_json(content.at("model")); });
  files.contracts_ = of_manifest(
      path, [&] { return contracts_from_json(content.at("contract"), content.at("targets"), files.config_); });
  files.take_tables(content);
  *incomplete = !files.hold();
  return files;
}

bool BundleFiles::hold() {
  bool complete = true;
  for (const auto& listed : files_) {
    try {
      held_[listed.first] = folder_->open_file(listed.first);
    } catch (const SystemError& error) {
      if (is_out_of_descriptors(error)) {
        refuse(path() + ": its " + std::to_string(files_.size()) + " files cannot be held open (" + error.what() +
               "); close bundles that are not needed, or allow the process more open files (ulimit -n)");
      }
      complete = false;  // what is wrong with the file is said when it is asked for
    }
  }
  return complete;
}

void BundleFiles::prove_files() {
  std::vector<std::string> problems;
  for (const auto& listed : files_) {
    if (const std::optional<std::string> problem = problem_of(listed.first)) {
      problems.push_back(in_quotes(listed.first) + " " + *problem);
    } else if (listed.first.size() > kOnnx.size() &&
               listed.first.compare(listed.first.size() - kOnnx.size(), kOnnx.size(), kOnnx) == 0) {
      for (const std::string& found : external_problems(listed.first, nullptr)) {
        problems.push_back("the external data of " + in_quotes(listed.first) + ": " + found);
      }
    }
  }
  std::vector<std::string> others;
  try {
    for (const std::string& name : folder_->files(others)) {
      if (name != kManifestName && files_.count(name) == 0) {
        problems.push_back(in_quotes(name) + " is not listed in " + kManifestName);
      }
    }
  } catch (const SystemError& error) {
    problems.push_back("cannot list " + path() + ": " + error.what());
  }
  problems.insert(problems.end(), others.begin(), others.end());
  if (!problems.empty()) refuse(problem_list(path() + " is not as it was built", problems) + "\n" + kAgain);
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
      targets_[name].target = target_from_json(name, entry, config_, name + " of " + path());
    } catch (const Error& error) {
      targets_[name].problem = error.what();
    }
  }
}

const Target& BundleFiles::target(const std::string& name) const {
  const auto found = targets_.find(name);
  if (found == targets_.end()) {
    throw Error(ErrorKind::input, "unknown target " + in_quotes(name) + ": " + path() + " was built for " +
                                      (target_names_.empty() ? "(none)" : joined(target_names_)));
  }
  if (!found->second.target) refuse(found->second.problem);
  return *found->second.target;
}

const GraphContract& BundleFiles::contract(const std::string& graph) const {
  const auto found = contracts_.find(graph);
  if (found == contracts_.end()) {
    throw Error(ErrorKind::unsupported, "a " + config_.architecture + " model has no " + graph + " graph");
  }
  return found->second;
}

HeldFile BundleFiles::held(const std::string& name) {
  if (const std::optional<std::string> problem = problem_of(name)) {
    refuse(in_quotes(name) + " in " + path() + " " + *problem + "; " + kAgain);
  }
  return {path() + "/" + name, held_.at(name), verified_.at(name), files_.at(name).sha256};
}

std::string BundleFiles::content(const std::string& name, std::size_t most) {
  const HeldFile file = held(name);
  std::optional<std::string> content;
  try {
    content = read_file(*file.file, most);
    if (!content) refuse(file.path + " has more than " + std::to_string(most) + " bytes, which no such file has");
    if (!file.unchanged()) refuse(file.path + " changed while it was read; " + kAgain);
  } catch (const SystemError& error) {
    refuse("cannot read " + file.path + ": " + error.what());
  }
  return *std::move(content);
}

HeldGraph BundleFiles::graph(const std::string& name) {
  const auto entry = weights_of_graph_.find(name);
  const auto uses = [&name](const auto& target) {
    if (!target.second.target) return false;
    const auto& graphs = target.second.target->graphs;
    return std::any_of(graphs.begin(), graphs.end(), [&name](const auto& graph) { return graph.second == name; });
  };
  if (entry == weights_of_graph_.end() && std::none_of(targets_.begin(), targets_.end(), uses)) {
    std::vector<std::string> known;
    for (const auto& graph : weights_of_graph_) known.push_back(graph.first);
    refuse(in_quotes(name) + " is not a graph of " + path() + "; its graphs are " +
           (known.empty() ? "(none)" : joined(known)));
  }
  HeldGraph graph;
  graph.path = path() + "/" + name;
  graph.model = content(name, kMaxGraphBytes);
  if (entry != weights_of_graph_.end()) {
    for (const std::string& weights : entry->second) held(weights);
  }
  std::vector<std::string> locations;
  const std::vector<std::string> problems = external_problems(name, &locations);
  if (!problems.empty()) refuse(problem_list("the external data of " + in_quotes(name) + " in " + path(), problems));
  const std::string folder = folder_of(name);
  graph.folder = folder_->entry_path() + "/" + folder;
  for (const std::string& location : locations) graph.weights.emplace(location, held(folder + location));
  return graph;
}

std::optional<std::string> BundleFiles::problem_of(const std::string& name) {
  const auto entry = files_.find(name);
  if (entry == files_.end()) return "is not listed in the manifest";
  if (std::optional<std::string> problem = name_problem(name)) return problem;
  try {
    std::shared_ptr<const RegularFile>& file = held_[name];
    if (file == nullptr) {
      if (std::optional<std::string> problem = folder_->problem(name)) return problem;
      file = folder_->open_file(name);
    }
    const FileState state = file->state();
    const auto known = verified_.find(name);
    if (known != verified_.end() && known->second == state) return std::nullopt;
    if (state.size != entry->second.size) {
      return "has " + std::to_string(state.size) + " bytes, the manifest says " + std::to_string(entry->second.size);
    }
    const HashedFile hashed = hash_file(*file);
    if (hashed.sha256 != entry->second.sha256) {
      return "has SHA-256 " + hashed.sha256 + ", the manifest says " + entry->second.sha256;
    }
    verified_[name] = hashed.state;
  } catch (const SystemError& error) {
    return "cannot be read (" + std::string(error.what()) + ")";
  }
  return std::nullopt;
}

std::vector<std::string> BundleFiles::external_problems(const std::string& name, std::vector<std::string>* locations) {
  std::vector<ExternalTensor> tensors;
  try {
    tensors = external_tensors(*held_.at(name), path() + "/" + name);
    if (held_.at(name)->state() != verified_.at(name)) return {"it changed while it was read"};
  } catch (const Error& error) {
    return {error.what()};
  }
  const std::string folder = folder_of(name);
  std::vector<std::string> problems;
  std::set<std::string> seen;
  for (const ExternalTensor& tensor : tensors) {
    if (!seen.insert(tensor.location).second) continue;
    if (locations != nullptr) locations->push_back(tensor.location);
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
