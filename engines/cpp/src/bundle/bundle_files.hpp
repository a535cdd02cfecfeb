// The files of an opened bundle: nothing is opened by anybody before its name, kind, size and SHA-256 were checked.
// The C++ twin of crt_export/bundle/files.py and opening.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/contract.hpp"
#include "bundle/held_files.hpp"
#include "bundle/target.hpp"
#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

class JsonValue;

struct FileEntry {
  std::uint64_t size = 0;
  std::string sha256;  // lower-case hex
};

/// The files of an opened bundle.
///
/// The folder and every listed file are held open from the beginning, so a bundle stays what it was when it was opened,
/// though a build may have put another one in its place. A file is hashed when it is first asked for, and again only if
/// stat shows that it changed since; what is read is the descriptor that was hashed. Copies share the descriptors. One
/// thread at a time.
class BundleFiles {
 public:
  /// Throws Error(bundle), with the refusals of crt_export.bundle.open_bundle; identity: the one it must have, "" for
  /// any.
  static BundleFiles open(const std::string& path, bool allow_unvalidated, const std::string& identity = "");

  const std::string& path() const noexcept { return folder_->path(); }
  const std::string& identity() const noexcept { return identity_; }
  const ModelConfig& config() const noexcept { return config_; }
  /// Content hash of the checkpoint that the bundle was built from.
  const std::string& checkpoint() const noexcept { return checkpoint_; }
  /// Whether it was shown to agree with PyTorch when it was built.
  bool validated() const noexcept { return validated_; }
  bool contains(const std::string& name) const { return files_.count(name) != 0; }
  const std::vector<std::string>& target_names() const noexcept { return target_names_; }
  /// Throws Error(input) if there is no such target, Error(bundle) if its entry is unusable.
  const Target& target(const std::string& name) const;
  /// Throws Error(unsupported) if the model has no such graph.
  const GraphContract& contract(const std::string& graph) const;

  /// A listed file whose size and SHA-256 are those of the manifest; throws Error(bundle).
  HeldFile held(const std::string& name);
  /// Its content, the very bytes that were hashed; most: bytes that are taken.
  std::string content(const std::string& name, std::size_t most);
  /// An ONNX graph and every weight file it points at.
  HeldGraph graph(const std::string& name);

 private:
  /// A target that could not be read is refused when it is asked for, so that it does not spoil the others.
  struct TargetEntry {
    std::optional<Target> target;
    std::string problem;
  };

  explicit BundleFiles(std::shared_ptr<const HeldFolder> folder) : folder_(std::move(folder)) {}
  /// Manifest and files of one and the same folder; incomplete: whether listed files were missing.
  static BundleFiles read(const std::string& path, bool* incomplete);
  /// Open every listed file; whether all are there.
  bool hold();
  /// Refuse a table of files that was written anew after the manifest, unless every file proves it.
  void prove_files();
  /// Read files, graphs and targets from a manifest that passed the schema.
  void take_tables(const JsonValue& manifest);
  /// Check one file and remember it if it is valid; what is wrong with it.
  std::optional<std::string> problem_of(const std::string& name);
  /// Check every file that the (already verified) graph points at; gives the locations.
  std::vector<std::string> external_problems(const std::string& name, std::vector<std::string>* locations);

  std::shared_ptr<const HeldFolder> folder_;
  std::string identity_;
  std::string checkpoint_;
  bool validated_ = false;
  bool files_as_written_ = true;
  ModelConfig config_;
  std::vector<std::string> target_names_;  // in the order of the manifest
  std::map<std::string, TargetEntry> targets_;
  GraphContracts contracts_;
  std::map<std::string, FileEntry> files_;
  std::map<std::string, std::vector<std::string>> weights_of_graph_;  // every file of "graphs" and its weight files
  std::map<std::string, std::shared_ptr<const RegularFile>> held_;
  std::map<std::string, FileState> verified_;
};

}  // namespace crt
