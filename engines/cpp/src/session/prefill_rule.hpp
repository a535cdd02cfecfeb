// How one prefill runs: what its caller asks for, and what the target does of its own accord. The C++ twin of
// prefill_rule() in crt_export/runtime/prefill.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "bundle/prefill_plan.hpp"
#include "crt_runtime/prefill.hpp"

namespace crt {

struct PrefillRule {
  std::int64_t passes = 0;     ///< most passes of a chunk; 0: those that the bundle was built with
  std::optional<float> bound;  ///< residual at which a chunk is done; unset: after all passes
  std::int64_t shortest = 1;   ///< chunks of fewer tokens go token by token
  std::int64_t chunk = 0;      ///< most tokens of a chunk
};

/// What a call of this target comes to; most: tokens that a call of the engine takes; unroll: passes that the target was
/// built with, which every target can make, 0 for a plain transformer. Throws Error(input) for a number
/// of passes or a chunk out of range, Error(unsupported) for passes of a plain transformer, or kAdaptive where no bound
/// is known.
PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool recurrent,
                         std::int64_t unroll, const std::string& target);

}  // namespace crt
