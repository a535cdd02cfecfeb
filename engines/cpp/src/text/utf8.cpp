#include "text/utf8.hpp"

#include <algorithm>

namespace crt {
namespace {

/// Length of the characters that begin with lead, 0 if none does, and the range of their second byte: it rules out
/// overlong forms (E0, F0), surrogates (ED) and what is beyond U+10FFFF (F4).
struct Lead {
  std::size_t length = 0;
  unsigned low = 0x80;
  unsigned high = 0xBF;
};

Lead lead_from_byte(unsigned lead) noexcept {
  if (lead < 0x80) return {1};
  if (lead < 0xC2) return {0};
  if (lead < 0xE0) return {2};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead < 0xF0) return {3};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead < 0xF4) return {4};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

}  // namespace

Utf8Prefix first_character(std::string_view text) noexcept {
  const Lead lead = lead_from_byte(static_cast<unsigned char>(text[0]));
  if (lead.length == 0) return {Utf8Prefix::invalid, 1};
  for (std::size_t index = 1; index < lead.length; ++index) {
    if (index == text.size()) return {Utf8Prefix::incomplete, index};
    const unsigned byte = static_cast<unsigned char>(text[index]);
    const unsigned low = index == 1 ? lead.low : 0x80;
    const unsigned high = index == 1 ? lead.high : 0xBF;
    if (byte < low || byte > high) return {Utf8Prefix::invalid, index};
  }
  return {Utf8Prefix::complete, lead.length};
}

std::size_t first_invalid_utf8(std::string_view text) noexcept {
  for (std::size_t offset = 0; offset < text.size();) {
    const Utf8Prefix prefix = first_character(text.substr(offset));
    if (prefix.kind != Utf8Prefix::complete) return offset;
    offset += prefix.length;
  }
  return std::string_view::npos;
}

std::size_t character_count(std::string_view text) noexcept {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), begins_character));
}

std::string first_characters(std::string_view text, std::size_t count) {
  std::size_t characters = 0;
  const auto beyond = [&](char byte) { return begins_character(byte) && characters++ == count; };
  return std::string(text.begin(), std::find_if(text.begin(), text.end(), beyond));
}

}  // namespace crt
