#include "text/messages.hpp"

#include <cstdio>
#include <locale>
#include <sstream>
#include <system_error>

#include "bundle/json.hpp"
#include "crt_runtime/terminal.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

/// What crt_export/visible.py escapes: C0 but tab and newline, DEL, C1, separators, marks of the reading direction.
bool steers(unsigned code) noexcept {
  return (code < 0x20 && code != '\n' && code != '\t') || (code >= 0x7F && code < 0xA0) || code == 0x061C ||
         code == 0x200E || code == 0x200F || (code >= 0x2028 && code <= 0x202E) || (code >= 0x2066 && code <= 0x2069);
}

/// Code point of a complete character.
unsigned code_point(std::string_view character) noexcept {
  const auto lead = static_cast<unsigned char>(character.front());
  unsigned code = character.size() == 1 ? lead : lead & (0x7FU >> character.size());
  for (const char byte : character.substr(1)) code = code << 6U | (static_cast<unsigned char>(byte) & 0x3FU);
  return code;
}

std::string escape(unsigned code) {
  char text[12];
  std::snprintf(text, sizeof text, code < 0x100 ? "\\x%02x" : "\\u%04x", code);
  return code == '\r' ? "\\r" : text;
}

}  // namespace

std::string visible(std::string_view text) {
  std::string result;
  while (!text.empty()) {
    const Utf8Prefix prefix = first_character(text);
    const std::string_view character = text.substr(0, prefix.length);
    if (prefix.kind != Utf8Prefix::complete) {
      for (const char byte : character) result += escape(static_cast<unsigned char>(byte));
    } else if (const unsigned code = code_point(character); steers(code)) {
      result += escape(code);
    } else {
      result += character;
    }
    text.remove_prefix(prefix.length);
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

std::string list_text(const std::vector<std::int64_t>& numbers) {
  std::string text;
  for (const std::int64_t number : numbers) text += (text.empty() ? "" : ", ") + std::to_string(number);
  return "[" + text + "]";
}

std::string problem_list(const std::string& heading, const std::vector<std::string>& problems) {
  if (problems.size() == 1) return heading + ": " + problems.front();
  return heading + ": " + std::to_string(problems.size()) + " problems\n  - " + joined(problems, "\n  - ");
}

void refuse_problems(ErrorKind kind, const std::string& heading, const std::vector<std::string>& problems) {
  if (!problems.empty()) throw Error(kind, problem_list(heading, problems));
}

std::string in_quotes(std::string_view text, std::size_t count) {
  std::string result = "'";
  for (const char character : visible(first_characters(text, count))) {
    if (character == '\n' || character == '\t') {
      result += character == '\n' ? "\\n" : "\\t";
    } else {
      result += character;
    }
  }
  return result + "'";
}

std::string shown(const JsonValue& value) {
  if (value.is_null()) return "null";
  if (value.is_boolean()) return value.boolean() ? "true" : "false";
  if (value.is_integer()) return std::to_string(value.integer());
  if (value.is_string()) return in_quotes(value.string(), 80);
  if (value.is_array()) return "a list of " + std::to_string(value.array().size());
  if (value.is_object()) return "an object of " + std::to_string(value.object().members().size()) + " members";
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.precision(17);
  text << value.number();
  return text.str();
}

std::string error_text(int error_number) { return std::generic_category().message(error_number); }

}  // namespace crt
