// What choosing a token needs of a session's past: draws so far, the token not yet fed, the tokens seen.
// The C++ twin of crt_export/runtime/history.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace crt {

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

  /// After a row's tokens went through the model: they are seen, and nothing of the row is pending any more. Without
  /// tokens the row stays as it is. Ids must lie within the vocabulary.
  void feed(std::int64_t row, const std::int64_t* tokens, std::size_t count) noexcept;
  /// After a draw. keep: the token was given out, so it is seen and pending; a stop token is not kept.
  void draw(std::int64_t row, std::int64_t token, bool keep) noexcept;
  /// Back to the beginning.
  void clear() noexcept;
  /// Take over the content of a snapshot; the sizes must be those of this history.
  void assign(std::vector<std::int64_t> drawn, std::vector<std::int64_t> pending,
              std::vector<std::uint8_t> seen) noexcept;

 private:
  std::size_t offset(std::int64_t row) const noexcept { return static_cast<std::size_t>(row) * vocab_; }

  std::size_t vocab_;
  std::vector<std::int64_t> drawn_;
  std::vector<std::int64_t> pending_;
  std::vector<std::uint8_t> seen_;
};

}  // namespace crt
