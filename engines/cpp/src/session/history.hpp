// What a generation needs of a session's past: draws so far, the token not yet fed, the tokens seen, what the text goes
// on from.
// The C++ twin of crt_export/runtime/rows.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace crt {

/// Tokens of a row that are kept as the context of its text.
inline constexpr std::size_t kRecentTokens = 1024;
/// In that context: the text before it was given out to its end. Python's TEXT_END.
inline constexpr std::int64_t kTextEnd = -1;

/// Drawing history of every row; part of a session and of its snapshots. Allocates only when made or copied.
class History {
 public:
  History(std::int64_t batch, std::int64_t vocab);

  /// Random draws of each row so far, int64 [batch]: the counter of its next random number.
  const std::vector<std::int64_t>& drawn() const noexcept { return drawn_; }
  /// Token of each row that was drawn and kept but not fed yet, int64 [batch]; kNoToken if there is none.
  const std::vector<std::int64_t>& pending() const noexcept { return pending_; }
  /// 1 for the tokens that a row was fed or has drawn, uint8 [batch, vocab]: what the repetition penalty applies to.
  const std::vector<std::uint8_t>& seen() const noexcept { return seen_; }
  /// The seen tokens of one row, uint8 [vocab].
  const std::uint8_t* seen(std::int64_t row) const noexcept { return seen_.data() + offset(row); }

  /// Last tokens that were fed to each row, the newest at the end, kTextEnd in front of the first and where a stop
  /// token ended the row's text; int64 [batch, kRecentTokens].
  const std::vector<std::int64_t>& recent() const noexcept { return recent_; }
  /// Those of one row, int64 [kRecentTokens].
  const std::int64_t* recent(std::int64_t row) const noexcept { return recent_.data() + recent_offset(row); }
  /// Characters at the end of each row's text that were not given out, because they may become a stop string; int64
  /// [batch]. Bytes that are no character yet do not count, recent() has them.
  const std::vector<std::int64_t>& held() const noexcept { return held_; }

  /// After a row's tokens went through the model: they are seen, and nothing of the row is pending any more. Tokens
  /// other than the pending one are not of the row's generated text: what of that was held back never comes. Without
  /// tokens the row stays as it is. Ids must lie within the vocabulary.
  void feed(std::int64_t row, const std::int64_t* tokens, std::size_t count) noexcept;
  /// After a draw. keep: the token was given out, so it is seen and pending; a stop token is not kept, and ends the
  /// row's text.
  void draw(std::int64_t row, std::int64_t token, bool keep) noexcept;
  /// How many characters of the row's text are held back.
  void hold(std::int64_t row, std::int64_t characters) noexcept { held_[static_cast<std::size_t>(row)] = characters; }
  /// Back to the beginning.
  void clear() noexcept;
  /// Take over the content of a snapshot; the sizes must be those of this history.
  void assign(std::vector<std::int64_t> drawn, std::vector<std::int64_t> pending, std::vector<std::uint8_t> seen,
              std::vector<std::int64_t> recent, std::vector<std::int64_t> held) noexcept;

 private:
  std::size_t offset(std::int64_t row) const noexcept { return static_cast<std::size_t>(row) * vocab_; }
  static std::size_t recent_offset(std::int64_t row) noexcept { return static_cast<std::size_t>(row) * kRecentTokens; }
  void remember(std::int64_t row, const std::int64_t* tokens, std::size_t count) noexcept;

  std::size_t vocab_;
  std::vector<std::int64_t> drawn_;
  std::vector<std::int64_t> pending_;
  std::vector<std::uint8_t> seen_;
  std::vector<std::int64_t> recent_;
  std::vector<std::int64_t> held_;
};

}  // namespace crt
