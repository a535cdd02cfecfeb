// Feeds tokens to an engine, and keeps what came back of every row: position, logits, next token. The C++ twin of
// crt_export/runtime/decoder.py.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "session/prefill.hpp"
#include "session/rows.hpp"
#include "session/slide.hpp"
#include "session/tensors.hpp"

namespace crt {

/// What a session is opened with, after every check.
struct SessionSetup {
  std::string target;
  std::string bundle;  // its identity
  TensorSizes sizes;
  bool slides = false;
  bool rows_are_independent = true;  ///< rows may share a call of the engine
  PrefillPlan plan;        ///< how prompts are taken unless a call says otherwise
};

/// The work of a session, without its guards: arguments are checked, and one call runs at a time.
class Decoder {
 public:
  Decoder(std::shared_ptr<Engine> engine, const SessionSetup& setup);

  const std::vector<std::int64_t>& position() const noexcept { return position_; }
  const std::vector<std::int64_t>& next_tokens() const noexcept { return next_tokens_; }
  SessionTensors& tensors() noexcept { return tensors_; }
  const std::shared_ptr<Engine>& engine() const noexcept { return engine_; }
  /// Most tokens of one prefill call.
  std::int64_t max_chunk() const noexcept { return max_chunk_; }

  /// Throws Error(input) listing every row whose new tokens, int64 [batch], exceed the capacity, unless rows slide.
  void check_room(const std::vector<std::int64_t>& lengths) const;
  /// What a prefill comes to; loads the graph of one pass if it needs that. Throws as crt::prefill_rule(), and
  /// Error(unsupported) if the target has no such graph.
  PrefillRule rule_of(const PrefillOptions& options);
  /// Feed the tokens of every row, cut at multiples of the chunk of that row's own tokens.
  void prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillRule& rule);
  /// Feed ids, int64 [batch], to the rows whose length, int64 [batch], is 1 and not 0; every id is valid. check_logits:
  /// whether logits that are not finite fail this call, wherever the engine computes.
  void step(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& lengths, bool check_logits);
  /// float32 [batch, vocab], NaN for rows without tokens; throws Error(contract) if others are not finite.
  const float* logits();

  /// Take everything from another decoder of the same setup.
  void assign(Decoder& other);
  /// Count these tokens as those that caches and states hold; rows without any come out as new.
  void resume(const std::vector<std::int64_t>& position, const std::vector<std::int64_t>& next_tokens);
  /// Forget every token; zero caches and states.
  void reset();
  /// After a failed call: go back to the position before it, as far as a row has not slid, and clear what is beyond.
  void abandon(const std::vector<std::int64_t>& before) noexcept;

 private:
  void feed_steps(const std::vector<RowTokens>& pieces);
  void feed_passes(const std::vector<RowTokens>& pieces, const PrefillRule& rule);
  void set_batches(const std::vector<std::int64_t>& lengths, bool rows_are_independent);
  void slide(const std::vector<std::int64_t>& lengths);
  void finish(const std::vector<std::int64_t>& lengths, bool check_logits);
  void refuse_non_finite(const std::string& name, const float* values, std::size_t width,
                         const std::vector<std::int64_t>& lengths) const;
  void refuse_unknown_tokens() const;

  std::shared_ptr<Engine> engine_;  // goes after the tensors
  std::string target_;
  SessionTensors tensors_;
  const TensorSizes& sizes_;  // those of the tensors
  std::size_t vocab_;
  std::optional<Window> window_;
  std::int64_t max_chunk_;
  bool rows_are_independent_;
  PrefillPlan plan_;
  std::vector<std::int64_t> position_;
  std::vector<std::int64_t> next_tokens_;
  bool logits_checked_ = true;
  // Scratch of one call, kept so that a step allocates nothing.
  std::vector<Batch> batches_;
  std::vector<std::int64_t> sliding_;
  std::vector<std::int64_t> zeros_;
};

}  // namespace crt
