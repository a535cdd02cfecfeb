// Where UTF-8 characters begin and end (Unicode 15, section 3.9, table 3-7).
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

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

/// text: at least one byte.
Utf8Prefix first_character(std::string_view text) noexcept;

/// Offset of the first byte that no character begins with, or of a character that the end cuts off; npos if there is
/// none.
std::size_t first_invalid_utf8(std::string_view text) noexcept;

/// Whether a byte of UTF-8 text begins a character.
inline bool begins_character(char byte) noexcept { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U; }

/// Number of characters of UTF-8 text.
std::size_t character_count(std::string_view text) noexcept;

/// At most count characters of UTF-8 text, never half of one.
std::string first_characters(std::string_view text, std::size_t count);

}  // namespace crt
