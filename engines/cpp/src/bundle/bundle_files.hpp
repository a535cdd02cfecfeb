// The files of an opened bundle: nothing is opened by anybody before its name, kind, size and SHA-256 were checked.
// The C++ twin of crt_export/bundle/files.py and opening.py.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/held_folder.hpp"
#include "bundle/paths.hpp"
#include "bundle/prefill_plan.hpp"
#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

class JsonValue;

struct FileEntry {
  std::uint64_t size = 0;
  std::string sha256;  // lower-case hex
};

/// The contract of one graph with the sizes of this model; batch, seq and capacity are -1.
struct GraphContract {
  std::vector<TensorSpec> inputs;
  std::vector<TensorSpec> outputs;
  std::vector<std::pair<std::string, std::string>> aliases;  // present output, past input
};

/// Options of an "ort-..." profile that loading needs.
struct OrtProfile {
  std::string graph_optimization = "all";
  std::vector<std::string> disabled_optimizers;
  bool spinning = true;
  bool huge_pages = true;
  bool mmap = false;
};

/// One target of the manifest; the twin of runtime/opening.py's Target.
struct Target {
  std::string name;
  std::string runtime;  // "onnxruntime", "tensorrt" or "tensorrt-rtx"
  std::string device;   // "cpu" or "cuda"
  std::string precision;
  std::map<std::string, std::string> graphs;   // graph name -> file of the bundle
  std::map<std::string, std::string> engines;  // graph name -> engine file; its sidecar is the same path with .json
  std::int64_t capacity = 0;
  std::optional<std::int64_t> unroll;
  DType cache_dtype = DType::float32;
  std::int64_t max_tokens = 0;  // profile.seq.max
  std::int64_t max_batch = 0;   // profile.batch.max
  int threads = 0;
  std::optional<int> compute_capability;
  OrtProfile ort;
  PrefillPlan prefill;

  /// Whether rows of one call get what each would get alone: not where activations are rounded after sums whose order
  /// depends on the number of rows (crt_export/runtime/opening.py says more).
  bool joins_rows() const { return precision != "w8"; }
};

/// What a TensorRT engine's sidecar says; checked before the engine is deserialised.
struct EngineSidecar {
  std::string graph;
  std::string runtime;
  std::string runtime_version;
  std::optional<int> compute_capability;
  std::int64_t capacity = 0;
  bool ampere_plus = false;
  bool version_compatible = false;
  std::map<std::string, std::array<Shape, 3>> input_shapes;  // min, opt, max
};

/// The files of an opened bundle.
///
/// The folder and every listed file are held open from the beginning, so a bundle stays what it was when it was opened,
/// though a build may have put another one in its place. A file is hashed when it is first asked for, and again only if
/// stat shows that it changed since; what is read is the descriptor that was hashed. Copies share the descriptors. One
/// thread at a time.
class BundleFiles {
 public:
  /// Throws Error(bundle), with the refusals of crt_export.bundle.open_bundle; identity: the one it must have, "" for any.
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
  /// What this library binds, whatever the manifest says; throws Error(unsupported) if the model has no such graph.
  const GraphContract& contract(const std::string& graph) const;

  /// A listed file whose size and SHA-256 are those of the manifest; throws Error(bundle).
  HeldFile held(const std::string& name);
  /// Its content, the very bytes that were hashed; most: bytes that are taken.
  std::string content(const std::string& name, std::size_t most);
  /// An ONNX graph and every weight file it points at.
  HeldGraph graph(const std::string& name);
  /// The sidecar of an engine file of a target; throws Error(bundle).
  EngineSidecar sidecar(const std::string& engine_file);

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
  /// Check one file and remember it if it is sound; what is wrong with it.
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
  std::map<std::string, GraphContract> contracts_;
  std::map<std::string, FileEntry> files_;
  std::map<std::string, std::vector<std::string>> weights_of_graph_;  // every file of "graphs" and its weight files
  std::map<std::string, std::shared_ptr<const RegularFile>> held_;
  std::map<std::string, FileState> verified_;
};

}  // namespace crt
