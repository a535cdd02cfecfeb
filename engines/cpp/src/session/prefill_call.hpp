// One chunk of tokens of neighbouring rows through the prefill graphs. The C++ twin of crt_export/runtime/prefill.py.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "session/rows.hpp"

namespace crt {

/// Gives the session's rows that a graph's tensor of this name is bound to.
using SharedRows = std::function<Rows(const std::string&)>;

/// Bind every input and output of a program by name, from own or else from the session's tensors.
std::unique_ptr<Launch> bind_by_name(Program& program, const Binding& own, const SharedRows& shared, bool repeated);

/// A chunk and how it runs.
struct PrefillCall {
  const TokenSpan* rows;          ///< of the group, at least one token each
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
  void run(Engine& engine, const SharedRows& shared, float* residual) const;
};

}  // namespace crt
