// The new text of one row: ids decoded to whole characters, searched for stop strings.
// The C++ twin of crt_export/runtime/row_text.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "crt_runtime/tokenizer.hpp"

namespace crt {

/// Passes text on up to the first stop string. The result does not depend on how the text is cut: the stop string that
/// is complete first ends the text; of those complete at the same character the longest one does. Works on the bytes of
/// UTF-8, in which a character never begins inside another.
class StopMatcher {
 public:
  /// stop_strings: UTF-8, none of them empty.
  explicit StopMatcher(std::vector<std::string> stop_strings);

  /// Take more text, whole characters; append to out what is certain to come before any stop string, nothing once one
  /// was found. Allocates nothing but what out needs, as long as pieces are short.
  void push(const std::string& text, std::string& out);
  /// No more text comes: what was held back is no stop string.
  void finish(std::string& out);
  /// Text that was taken and not passed on: it may become a stop string.
  const std::string& held() const noexcept { return held_; }
  /// A text that ends, up to the first stop string in it.
  std::string before_a_stop(const std::string& text) const;
  /// Whether a stop string ended the text.
  bool found() const noexcept { return found_; }

 private:
  std::size_t beginning_of_a_stop() const noexcept;

  std::vector<std::string> stops_;
  std::size_t longest_ = 0;
  std::string held_;
  bool found_ = false;
};

/// Grows with every token; without a decoder it stays empty.
class RowText {
 public:
  /// reserved: tokens to keep room for.
  RowText(std::optional<TextStream> decoder, const std::vector<std::string>& stop_strings, std::size_t reserved);

  /// Start behind other tokens instead: they leave an incomplete character to this text. context: count tokens, the
  /// newest at the end, kTextEnd among them; held: how many of the last characters of their text belong to this one.
  void go_on(const std::int64_t* context, std::size_t count, std::int64_t held);
  /// The next step begins: its piece is empty.
  void begin_step() noexcept { piece_.clear(); }
  /// Take a token; its text, as far as no stop string can claim it any more, is added.
  void push(std::int64_t token);
  /// The text has ended: add its rest, U+FFFD for bytes that never became a character, up to a stop string.
  void finish();

  const std::string& text() const noexcept { return text_; }
  /// The text since begin_step().
  const std::string& piece() const noexcept { return piece_; }
  /// What finish() would add.
  std::string rest() const;
  /// Characters that were not given out because they may become a stop string.
  std::int64_t held() const noexcept;
  /// Whether a stop string ended the text.
  bool stopped() const noexcept { return stops_.found(); }

 private:
  void give_carried();
  void keep_piece(std::size_t begin);

  std::optional<TextStream> decoder_;
  StopMatcher stops_;
  std::string carried_;  // of the tokens in front, not given out yet
  std::string text_;
  std::string piece_;
};

}  // namespace crt
