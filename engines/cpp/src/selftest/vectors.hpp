// The vectors of a bundle: crt_export/selftest/vectors.py describes the file and is its twin.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "bundle/held_files.hpp"
#include "crt_runtime/config.hpp"
#include "crt_runtime/snapshot.hpp"

namespace crt {

inline constexpr char kVectorsFile[] = "selftest/vectors.safetensors";
inline constexpr char kRecurrence[] = "recurrence";

/// Name of the run whose prompt goes through K passes over chunks of at most that many tokens.
std::string prefill_run(std::int64_t unroll, std::int64_t chunk);
/// Name of the tensor that says what a precision divides the values of a cache by; not every one does.
std::string divisor_name(const std::string& precision, std::size_t cache);

/// What PyTorch FP32 computed for a few tokens: a prompt, then teacher-forced steps, in several runs.
class SelftestVectors {
 public:
  /// Read and check a file for a model and the content hash of its checkpoint. Throws Error(bundle), all problems of a
  /// kind at once.
  static SelftestVectors load(const HeldFile& file, const ModelConfig& config, const std::string& checkpoint);

  std::int64_t prompt() const noexcept { return prompt_; }
  std::int64_t steps() const noexcept { return steps_; }
  const std::vector<std::int64_t>& input_ids() const { return numbers_.at("input_ids"); }
  /// Largest relative error by precision.
  const std::map<std::string, double>& limits() const noexcept { return limits_; }
  const std::vector<std::string>& runs() const noexcept { return runs_; }
  bool has_run(const std::string& run) const noexcept;
  bool has_values(const std::string& name) const noexcept { return values_.count(name) != 0; }
  const std::vector<float>& values(const std::string& name) const { return values_.at(name); }
  const std::vector<std::int64_t>& numbers(const std::string& name) const { return numbers_.at(name); }
  /// Which columns of the logits are stored at an index: the first, and how far apart.
  std::int64_t first_column(std::int64_t index) const noexcept { return all_columns(index) ? 0 : index % stride_; }
  std::int64_t column_stride(std::int64_t index) const noexcept { return all_columns(index) ? 1 : stride_; }

 private:
  using Shape = std::vector<std::int64_t>;
  struct Expected {
    const char* dtype;
    Shape shape;
  };

  SelftestVectors() = default;
  bool all_columns(std::int64_t index) const noexcept { return index == 0 || index == steps_; }
  void take_metadata(const std::map<std::string, std::string>& metadata, const std::string& checkpoint,
                     std::vector<std::string>* problems);
  /// Dtype and shape of every tensor; of those that may be absent, those whose first cache is found.
  std::map<std::string, Expected> expected(const ModelConfig& config,
                                           const std::map<std::string, const SnapshotTensor*>& found) const;
  void check_shapes(const std::vector<SnapshotTensor>& tensors, const ModelConfig& config,
                    std::vector<std::string>* problems);
  void take_values(const std::vector<SnapshotTensor>& tensors, const ModelConfig& config,
                   std::vector<std::string>* problems);

  std::int64_t prompt_ = 0;
  std::int64_t steps_ = 0;
  std::int64_t stride_ = 1;
  std::map<std::string, double> limits_;
  std::vector<std::string> runs_;
  std::map<std::string, std::vector<float>> values_;
  std::map<std::string, std::vector<std::int64_t>> numbers_;
};

}  // namespace crt
