// What a target does with prompts where the caller leaves it the choice; "prefill" of its entry in the manifest.
#pragma once

#include <cstdint>
#include <optional>

namespace crt {

enum class PrefillMethod { steps, passes, adaptive };

/// The C++ twin of PrefillPlan in crt_export/runtime/prefill.py.
struct PrefillPlan {
  PrefillMethod method = PrefillMethod::passes;
  /// Of `passes`, and the most of `adaptive`; unset: those that the bundle was built with, one for a plain transformer.
  std::optional<std::int64_t> passes;
  std::optional<std::int64_t> chunk;  ///< most tokens of a chunk; unset: the target's limit
  std::int64_t shortest = 1;          ///< a chunk of fewer tokens goes token by token
  std::optional<double> residual_bound;
};

}  // namespace crt
