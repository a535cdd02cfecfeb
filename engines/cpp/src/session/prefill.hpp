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

/// What a call of this target comes to; most: tokens that a call of the engine takes; iterated: whether the model has
/// passes at all; unroll: passes that the target was built with, which every target can make, 0 where one is exact.
/// Throws Error(input) for a number of passes or a chunk out of range, Error(unsupported) for passes of a model that is
/// not iterated, or kAdaptive where no bound is known.
PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool iterated,
                         std::int64_t unroll, const std::string& target);

/// Gives the session's rows that a graph's tensor of this name is bound to.
using SharedSlices = std::function<BufferSlice(const std::string&)>;

/// Bind every input and output of a program by name, from own or else from the session's tensors.
std::unique_ptr<Launch> bind_by_name(Program& program, const Binding& own, const SharedSlices& shared, bool repeated);

/// Tensors by the names that a graph gives them.
using Tensors = std::map<std::string, std::unique_ptr<Buffer>>;

/// What a graph over a chunk takes and gives that no later call reads; iterates are zeros to start with.
Tensors own_tensors(Engine& engine, const ModelConfig& model, std::int64_t rows, std::int64_t seq);

/// A chunk and how it runs.
struct PrefillCall {
  const ModelConfig& model;       ///< its states and sizes
  const RowTokens* rows;          ///< of the batch, at least one token each
  const std::int64_t* positions;  ///< tokens in the cache of each row before these
  std::int64_t count = 0;         ///< rows
  std::int64_t seq = 0;           ///< length they are padded to
  /// 0 for the graph "prefill"; else that many calls of "prefill_pass", each fed the iterates of the one before.
  std::int64_t passes = 0;
  /// For one row alone: done as soon as its residual is at most this; where all passes do not get there, the rest goes
  /// token by token. Unset: all passes are made.
  std::optional<float> bound;

  /// Run it; states and caches of the last pass are left where shared says. residual: float32 [count], filled with that
  /// of the last pass if the model is iterated.
  void run(Engine& engine, const SharedSlices& shared, float* residual) const;
};

}  // namespace crt
