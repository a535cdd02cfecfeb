// How one prefill runs: what its caller asks for and what the target does of its own accord, and one chunk of tokens
// through the prefill graphs. The C++ twin of crt_export/runtime/prefill.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle/target.hpp"
#include "crt_runtime/prefill.hpp"
#include "engine/engine.hpp"
#include "session/rows.hpp"

namespace crt {

struct PrefillRule {
  std::int64_t passes = 0;     ///< most passes of a chunk; 0: those that the bundle was built with
  std::optional<float> bound;  ///< residual at which a chunk is done; unset: after all passes
  std::int64_t shortest = 1;   ///< chunks of fewer tokens go token by token
  std::int64_t chunk = 0;      ///< most tokens of a chunk
};

/// What a call of this target comes to; most: tokens that a call of the engine takes; unroll: passes that the target
/// was built with, which every target can make, 0 for a plain transformer. Throws Error(input) for a number of passes
/// or a chunk out of range, Error(unsupported) for passes of a plain transformer, or kAdaptive where no bound is known.
PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool recurrent,
                         std::int64_t unroll, const std::string& target);

/// Gives the session's rows that a graph's tensor of this name is bound to.
using SharedSlices = std::function<BufferSlice(const std::string&)>;

/// Bind every input and output of a program by name, from own or else from the session's tensors.
std::unique_ptr<Launch> bind_by_name(Program& program, const Binding& own, const SharedSlices& shared, bool repeated);

/// A chunk and how it runs.
struct PrefillCall {
  const RowTokens* rows;          ///< of the batch, at least one token each
  const std::int64_t* positions;  ///< tokens in the cache of each row before these
  std::int64_t count = 0;         ///< rows
  std::int64_t seq = 0;           ///< length they are padded to
  std::int64_t hidden = 0;        ///< hidden size
  bool recurrent = true;          ///< whether there are passes and a residual
  /// 0 for the graph "prefill"; else that many calls of "prefill_pass", each fed the hidden iterate of the one before.
  std::int64_t passes = 0;
  /// For one row alone: done as soon as its residual is at most this; where all passes do not get there, the rest goes
  /// token by token. Unset: all passes are made.
  std::optional<float> bound;

  /// Run it; state and caches of the last pass are left where shared says. residual: float32 [count], filled with that
  /// of the last pass, unless the model is a plain transformer.
  void run(Engine& engine, const SharedSlices& shared, float* residual) const;
};

}  // namespace crt
