// Token by token: the loop around a session.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "crt_runtime/export.h"
#include "crt_runtime/prefill.hpp"
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
  std::vector<std::int64_t> stop_tokens;  ///< ids that end a row, besides the model's end-of-sequence tokens
  std::vector<std::string> stop_strings;  ///< UTF-8; end a row where its new text holds one (byte models only)
  bool ignore_eos = false;                ///< go on after the model's end-of-sequence tokens
  std::int64_t passes = kTargetsChoice;   ///< how prompts are taken, as in PrefillOptions

  /// Throws Error(input) listing every value that is out of its range.
  void check() const;
};

/// Called for every new token, after the whole batch has drawn, with (row, token, text that it completes); with
/// kNoToken where a stop token lets out text that was held back. false stops the row.
using TokenCallback = std::function<bool(std::int64_t row, std::int64_t token, const std::string& piece)>;

/// Reads like an iterator: next() runs the model once. The session must outlive it and must not be moved; leave it
/// alone while its generation is being read. A generation belongs to the thread that runs its session: another thread's
/// call is refused only while the model runs, not while tokens are drawn or the callback is called.
/// For every token, these reasons to end its row are looked at in this order:
///   stop_token      it is a stop token: not given out and not part of the row;
///   stop_string     the row's new text contains a stop string: the token counts, the text ends before the string;
///   max_new_tokens  it was the last token allowed;
///   callback        the application said so.
/// Text goes on from what the row was fed, comes in whole characters, and what may still become a stop string is held
/// back. A stop token ends the text: the rest comes out (should a stop string turn up in it, the reason is
/// stop_string). After max_new_tokens or callback the text may go on: what is held back then belongs to the session and
/// its snapshots, and a generation that goes on without a prompt gives it out, so that the texts of the parts are the
/// text of an unbroken generation. Where nothing follows, rest() is what is missing. A stopped row is frozen. The last
/// token given out has not been fed to the model: the session remembers it and feeds it first when it goes on.
class Generation {
 public:
  /// As Session::generate(). Throws Error(input) if the options or prompts are refused, the session does, a row neither
  /// holds a token nor gets one, or prompt and new tokens do not fit; Error(unsupported) for stop strings where this
  /// library has no tokenizer for the model.
  Generation(Session& session, std::vector<std::vector<std::int64_t>> prompts, GenerationOptions options,
             TokenCallback callback);
  ~Generation();
  Generation(Generation&&) noexcept;
  Generation& operator=(Generation&&) noexcept;

  /// One new token per row into tokens[batch], kNoToken for a stopped row; false when every row has stopped. The last
  /// true may come with no token at all, where a stop token lets out text that was held back.
  /// Throws what Session::step() throws, and what the callback throws.
  bool next(std::int64_t* tokens);
  /// New tokens of a row so far.
  const std::vector<std::int64_t>& tokens(std::size_t row) const;
  /// New text of a row so far, whole characters, without the stop string; empty for models without byte tokenizer.
  const std::string& text(std::size_t row) const;
  /// The part of that text that the last next() added.
  const std::string& piece(std::size_t row) const;
  /// Text of a row that is held back, as if nothing followed: U+FFFD for bytes that are no character yet; empty where a
  /// stop token or a stop string ended the row.
  std::string rest(std::size_t row) const;
  /// Tokens of a row's prompt.
  std::size_t prompt_tokens(std::size_t row) const;
  StopReason stop_reason(std::size_t row) const;

 private:
  struct CRT_RUNTIME_LOCAL State;
  std::unique_ptr<State> state_;
};

}  // namespace crt
