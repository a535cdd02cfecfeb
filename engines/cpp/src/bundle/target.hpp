// One target of a bundle: the engine profile it was built for, its files and sizes, and how it takes prompts.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "bundle/json.hpp"
#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

/// Most CPU threads of a profile or a session.
inline constexpr std::int64_t kMostThreads = 1024;

enum class PrefillMethod { steps, passes, adaptive };

/// What a target does with prompts where the caller leaves it the choice: the C++ twin of PrefillPlan in
/// crt_export/runtime/prefill.py.
struct PrefillPlan {
  PrefillMethod method = PrefillMethod::passes;
  /// Of `passes`, and the most of `adaptive`; unset: those that the bundle was built with, one where a pass is exact.
  std::optional<std::int64_t> passes;
  std::optional<std::int64_t> chunk;  ///< most tokens of a chunk; unset: the target's limit
  std::int64_t shortest = 1;          ///< a chunk of fewer tokens goes token by token
  std::optional<double> residual_bound;
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
  bool rows_are_independent() const { return precision != "w8"; }
};

/// Every problem of an engine profile: unknown and missing keys, impossible values. A profile that crt_export would
/// not build for is refused, so that both languages open the same targets.
std::vector<std::string> profile_problems(const JsonValue& profile);

/// Read one target.
///
/// name, entry: a member of "targets" that passed the schema; source names it in error messages.
/// Throws Error(bundle): its profile is unusable; every problem is listed.
Target target_from_json(const std::string& name, const JsonValue& entry, const ModelConfig& config,
                        const std::string& source);

}  // namespace crt
