// Finds stop strings in text that arrives in pieces, and holds back what may still become one.
// The C++ twin of crt_export/runtime/row_text.py.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

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

}  // namespace crt
