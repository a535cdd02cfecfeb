// How prompts are taken.
#pragma once

#include <cstdint>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

// What `passes` may be besides a number of parallel passes over every chunk.

/// The target's own choice: "prefill" of its entry in the manifest.
inline constexpr std::int64_t kTargetsChoice = 0;
/// Token by token, as step() would.
inline constexpr std::int64_t kExact = -1;
/// Passes until their residual is below the target's bound, row by row; where the target's most passes do not get there
/// the rest of the chunk goes token by token.
inline constexpr std::int64_t kAdaptive = -2;

/// How a prefill runs.
struct PrefillOptions {
  /// A number of passes over every chunk (as many as it has tokens give the result of step by step), kExact, kAdaptive,
  /// or kTargetsChoice.
  std::int64_t passes = kTargetsChoice;
  /// Most tokens of one call; 0 takes that of the target's choice, and its limit for a number of passes.
  std::int64_t chunk = 0;
};

}  // namespace crt
