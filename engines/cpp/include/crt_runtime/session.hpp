// A running model: prefill and step over a batch of rows, each with its own length.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "crt_runtime/export.h"
#include "crt_runtime/generation.hpp"
#include "crt_runtime/prefill.hpp"
#include "crt_runtime/snapshot.hpp"

namespace crt CRT_RUNTIME_API {

class History;
struct ModelConfig;

/// A row that a step leaves as it is, and a row of a generation that has stopped.
inline constexpr std::int64_t kNoToken = -1;

/// What happens when a row's tokens no longer fit.
enum class OnFull {
  error,          ///< Error(input), nothing changes
  evict,          ///< models with an attention window: drop what the window no longer sees
  slide = evict,  ///< another name
};

/// How a session is opened.
struct SessionOptions {
  std::int64_t batch = 1;             ///< number of rows
  std::optional<int> threads;         ///< CPU threads, 0 for every core; unset takes the profile's
  std::optional<std::int64_t> capacity;  ///< most tokens a row can hold; unset takes the target's
  OnFull on_full = OnFull::error;
};

/// One batch of sequences on one target; made by Bundle::session().
///
/// Rows never influence each other. A call that is refused (Error of kind input) changes nothing. A call that fails,
/// or gives a value that is not finite, poisons the session: every further call is refused until reset() or restore().
/// One thread at a time: a call while another call of the session runs is refused; position() and generations, which
/// belong to that thread, do not look. Sessions of one bundle may run in different threads and
/// share weights and threads. After the first steps, step() allocates nothing of its own, but where a cache in host
/// memory grows: by 128 tokens, up to the capacity.
class Session {
 public:
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  const std::string& target() const noexcept;
  std::int64_t batch() const noexcept;
  std::int64_t capacity() const noexcept;
  std::int64_t vocab_size() const noexcept;
  /// Each of them ends a sequence; empty if the model has none.
  const std::vector<std::int64_t>& eos_token_ids() const noexcept;
  /// Tokens in the cache of each row, int64 [batch]; for the thread that runs the session only.
  const std::int64_t* position() const noexcept;
  /// Logits after each row's last token, float32 [batch, vocab], NaN for a row without tokens; valid until the next
  /// call.
  const float* logits();

  /// Append tokens to every row, token by token or in parallel passes; an empty row stays as it is. Returns logits().
  const float* prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillOptions& options = {});
  /// Append one token per row, kNoToken for none. Returns logits().
  const float* step(const std::int64_t* tokens, std::size_t count);
  const float* step(const std::vector<std::int64_t>& tokens) { return step(tokens.data(), tokens.size()); }
  /// As step(), but the logits stay where the engine computes until logits() asks for them: with next_tokens() a greedy
  /// loop on a GPU copies one id per row to the host.
  void advance(const std::int64_t* tokens, std::size_t count);
  /// The engine's argmax after each row's last token, int64 [batch]; kNoToken for a row without tokens.
  const std::int64_t* next_tokens();
  /// Forget every token, zero caches and state, lift a poisoning.
  void reset();

  Snapshot snapshot();
  /// Take everything from a snapshot of the same bundle, target and batch. Throws Error(bundle) for any other.
  void restore(const Snapshot& snapshot);
  /// A second session with the same content; the two go on independently.
  Session fork();

  /// Continue every row from its prompt; an empty prompt (or none at all) goes on from what the session holds.
  Generation generate(std::vector<std::vector<std::int64_t>> prompts = {}, GenerationOptions options = {},
                      TokenCallback callback = nullptr);

 private:
  friend class Bundle;
  friend class Generation;
  class CRT_RUNTIME_LOCAL Impl;
  explicit Session(std::unique_ptr<Impl> impl);
  // For Generation; generate() itself is defined in generation.cpp.
  History& history() noexcept;
  const ModelConfig& config() const noexcept;
  bool slides() const noexcept;
  /// Throws Error(input) if an earlier call failed or another thread's call runs, Error(unsupported) if such
  /// passes need what the model or target lacks.
  void require_usable(std::int64_t passes);
  void fail(const char* reason) noexcept;
  std::unique_ptr<Impl> impl_;
};

}  // namespace crt
