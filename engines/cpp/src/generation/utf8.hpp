// Where UTF-8 characters begin and end (Unicode 15, section 3.9, table 3-7).
#pragma once

#include <cstddef>
#include <string>

namespace crt {

/// U+FFFD, which stands for bytes that are not UTF-8.
inline constexpr const char* kReplacementCharacter = "\xEF\xBF\xBD";

/// What the bytes at the beginning of a text are.
struct Utf8Prefix {
  enum Kind {
    complete,    ///< a character of length bytes
    incomplete,  ///< all length bytes may become a character
    invalid,     ///< the maximal subpart of an ill-formed sequence: one U+FFFD for these length bytes
  };
  Kind kind = incomplete;
  std::size_t length = 0;
};

/// text: size bytes, at least one.
Utf8Prefix first_character(const char* text, std::size_t size) noexcept;

/// Offset of the first byte that no character begins with, or of a character that the end cuts off; npos if there is
/// none.
std::size_t first_invalid_utf8(const std::string& text) noexcept;

}  // namespace crt
