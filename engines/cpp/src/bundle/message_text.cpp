#include "bundle/message_text.hpp"

#include <cstdint>
#include <iomanip>
#include <locale>
#include <sstream>
#include <system_error>

#include "bundle/json.hpp"
#include "crt_runtime/terminal.hpp"

namespace crt {
namespace {

bool starts_character(char byte) noexcept { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U; }

void append_hex(std::string& text, unsigned char byte) {
  constexpr std::string_view digits = "0123456789abcdef";
  text += "\\x";
  text += digits[byte >> 4U];
  text += digits[byte & 15U];
}

/// Bytes of the well-formed UTF-8 character that begins the text; 0 where none does. Sets its code point.
std::size_t character_bytes(std::string_view text, std::uint32_t& code) noexcept {
  const auto lead = static_cast<unsigned char>(text.front());
  const std::size_t bytes = lead < 0x80U ? 1 : lead >> 5U == 6U ? 2 : lead >> 4U == 14U ? 3 : lead >> 3U == 30U ? 4 : 0;
  if (bytes == 0 || bytes > text.size()) return 0;
  code = bytes == 1 ? lead : lead & (0x7FU >> bytes);
  for (std::size_t index = 1; index < bytes; ++index) {
    if (starts_character(text[index])) return 0;
    code = code << 6U | (static_cast<unsigned char>(text[index]) & 0x3FU);
  }
  constexpr std::uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
  return code < least[bytes] ? 0 : bytes;
}

/// What crt_export/visible.py escapes: C0 but tab and newline, DEL, C1, separators, marks of the reading direction.
bool steers(std::uint32_t code) noexcept {
  return (code < 0x20 && code != '\n' && code != '\t') || (code >= 0x7F && code < 0xA0) || code == 0x061C ||
         code == 0x200E || code == 0x200F || (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
}

std::string number_text(double value) {
  std::string text;
  for (int precision = 15; precision <= 17; ++precision) {  // the shortest that reads back as the same double
    std::ostringstream stream;
    stream.imbue(std::locale::classic());
    stream.precision(precision);
    stream << value;
    text = stream.str();
    std::istringstream back(text);
    back.imbue(std::locale::classic());
    double again = 0;
    if (back >> again && again == value) break;
  }
  return text.find_first_of(".en") == std::string::npos ? text + ".0" : text;
}

/// Appends the repr; stops soon after text has count bytes, so that a list of millions costs nothing.
void append_shown(std::string& text, const JsonValue& value, std::size_t count) {
  if (text.size() > count) return;
  if (value.is_null()) {
    text += "None";
  } else if (value.is_boolean()) {
    text += value.boolean() ? "True" : "False";
  } else if (value.is_integer()) {
    text += std::to_string(value.integer());
  } else if (value.is_number()) {
    text += number_text(value.number());
  } else if (value.is_string()) {
    text += in_quotes(value.string(), count);
  } else if (value.is_array()) {
    text += '[';
    for (const JsonValue& item : value.array()) {
      if (text.size() > count) return;
      if (&item != &value.array().front()) text += ", ";
      append_shown(text, item, count);
    }
    text += ']';
  } else {
    text += '{';
    for (const JsonMember& member : value.object().members()) {
      if (text.size() > count) return;
      if (&member != &value.object().members().front()) text += ", ";
      text += in_quotes(member.first, count) + ": ";
      append_shown(text, member.second, count);
    }
    text += '}';
  }
}

struct Block {
  std::size_t a = 0;
  std::size_t b = 0;
  std::size_t length = 0;
};

/// The longest piece that both have; of several the first in a, of those the first in b.
Block longest_match(std::string_view a, std::string_view b) {
  Block best;
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = 0; j < b.size(); ++j) {
      std::size_t length = 0;
      while (i + length < a.size() && j + length < b.size() && a[i + length] == b[j + length]) ++length;
      if (length > best.length) best = {i, j, length};
    }
  }
  return best;
}

std::size_t matched_characters(std::string_view a, std::string_view b) {
  const Block best = longest_match(a, b);
  if (best.length == 0) return 0;
  return matched_characters(a.substr(0, best.a), b.substr(0, best.b)) + best.length +
         matched_characters(a.substr(best.a + best.length), b.substr(best.b + best.length));
}

}  // namespace

std::string visible(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    std::uint32_t code = 0;
    const std::size_t bytes = character_bytes(text, code);
    const auto first = static_cast<unsigned char>(text.front());
    if (bytes == 0 || (steers(code) && code < 0x100)) {
      if (code == '\r' && bytes == 1) {
        result += "\\r";
      } else {
        append_hex(result, bytes == 0 ? first : static_cast<unsigned char>(code));
      }
    } else if (steers(code)) {
      std::ostringstream escape;
      escape.imbue(std::locale::classic());
      escape << "\\u" << std::hex << std::setw(4) << std::setfill('0') << code;
      result += escape.str();
    } else {
      result += text.substr(0, bytes);
    }
    text.remove_prefix(bytes == 0 ? 1 : bytes);
  }
  return result;
}

std::string joined(const std::vector<std::string>& parts, std::string_view separator) {
  std::string text;
  for (const std::string& part : parts) {
    if (&part != &parts.front()) text += separator;
    text += part;
  }
  return text;
}

std::string first_characters(std::string_view text, std::size_t count) {
  std::size_t characters = 0;
  for (std::size_t at = 0; at < text.size(); ++at) {
    if (starts_character(text[at]) && characters++ == count) return std::string(text.substr(0, at));
  }
  return std::string(text);
}

std::string in_quotes(std::string_view text, std::size_t count) {
  const bool double_quotes = text.find('\'') != std::string_view::npos && text.find('"') == std::string_view::npos;
  const char quote = double_quotes ? '"' : '\'';
  std::string result(1, quote);
  const std::string shortened = first_characters(text, count);
  for (std::size_t i = 0; i < shortened.size(); ++i) {
    const char character = shortened[i];
    const auto byte = static_cast<unsigned char>(character);
    const auto next = static_cast<unsigned char>(i + 1 < shortened.size() ? shortened[i + 1] : '\0');
    if (character == '\\' || character == quote) {
      result += '\\';
      result += character;
    } else if (character == '\n' || character == '\r' || character == '\t') {
      result += character == '\n' ? "\\n" : character == '\r' ? "\\r" : "\\t";
    } else if (byte < 0x20 || byte == 0x7F) {
      append_hex(result, byte);
    } else if (byte == 0xC2 && next >= 0x80 && next < 0xA0) {  // a control character of C1, which terminals obey too
      append_hex(result, next);
      ++i;
    } else {
      result += character;
    }
  }
  return first_characters(result + quote, count);
}

std::string shown(const JsonValue& value, std::size_t count) {
  std::string text;
  append_shown(text, value, 4 * count);  // a character has up to four bytes
  return first_characters(text, count);
}

std::optional<std::string> close_match(std::string_view word, const std::vector<std::string>& candidates) {
  constexpr std::size_t most_compared = 199;  // the comparison is cubic; longer names and lists get no suggestion
  constexpr double cutoff = 0.6;
  if (word.size() > most_compared || candidates.size() > most_compared) return std::nullopt;
  std::optional<std::string> best;
  double best_ratio = cutoff;
  for (const std::string& candidate : candidates) {
    if (candidate.size() > most_compared || candidate.empty()) continue;
    const double matched = static_cast<double>(matched_characters(candidate, word));
    const double ratio = 2.0 * matched / static_cast<double>(candidate.size() + word.size());
    // of equals difflib keeps the alphabetically last
    if (ratio > best_ratio || (ratio >= cutoff && ratio == best_ratio && (!best || candidate > *best))) {
      best = candidate;
      best_ratio = ratio;
    }
  }
  return best;
}

std::string error_text(int error_number) { return std::generic_category().message(error_number); }

}  // namespace crt
