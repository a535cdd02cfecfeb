// Token by token: the loop around a session.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "crt_runtime/export.h"
#include "crt_runtime/sampling.hpp"

namespace crt CRT_RUNTIME_API {

class Session;

/// Why a row stopped; names as in Python.
enum class StopReason { running, max_new_tokens, stop_token, stop_string, callback };
const char* stop_reason_name(StopReason reason) noexcept;

/// How far a generation goes and how it chooses.
struct GenerationOptions {
  std::int64_t max_new_tokens = 64;  ///< most tokens per row
  SamplingOptions sampling;
  std::vector<std::int64_t> stop_token_ids;  ///< end a row, besides the model's end-of-sequence token
  std::vector<std::string> stop_strings;     ///< UTF-8; end a row where its new text holds one (byte models only)
  bool ignore_eos = false;                   ///< go on after the model's end-of-sequence token
  std::int64_t passes = 0;                   ///< passes of the prefill; 0 takes the unrolled graph

  /// Throws Error(input) listing every value that is out of its range.
  void check() const;
};

/// Called for every new token with (row, token, text that it completes); false stops the row.
using TokenCallback = std::function<bool(std::int64_t row, std::int64_t token, const std::string& piece)>;

/// Reads like an iterator: next() runs the model once. The session must outlive it.
/// A stop token ends its row and is not given out; a stopped row is frozen. The last token given out has not been fed
/// to the model: the session remembers it and feeds it first when it goes on.
class Generation {
 public:
  Generation(Session& session, std::vector<std::vector<std::int64_t>> prompts, GenerationOptions options,
             TokenCallback callback);
  ~Generation();
  Generation(Generation&&) noexcept;
  Generation& operator=(Generation&&) noexcept;

  /// One new token per row into tokens[batch], kNoToken for a stopped row; false when every row has stopped.
  bool next(std::int64_t* tokens);
  /// New tokens of a row so far.
  const std::vector<std::int64_t>& tokens(std::size_t row) const;
  /// New text of a row so far, whole characters, without the stop string; empty for models without byte tokenizer.
  const std::string& text(std::size_t row) const;
  StopReason stop_reason(std::size_t row) const;

 private:
  struct CRT_RUNTIME_LOCAL State;
  std::unique_ptr<State> state_;
};

}  // namespace crt
