// How error messages show texts and values: as Python's repr does.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace crt {

class JsonValue;

std::string joined(const std::vector<std::string>& parts, std::string_view separator = ", ");

/// At most count characters of UTF-8 text, never half of one.
std::string first_characters(std::string_view text, std::size_t count);

/// The text in quotes with escapes, cut to count characters; what Python shows with !r.
std::string in_quotes(std::string_view text, std::size_t count = 1200);

/// A value of a JSON file as Python shows it (None, True, 'text', [1, 2]), cut to count characters.
std::string shown(const JsonValue& value, std::size_t count = 60);

/// "did you mean": the candidate most like word by difflib's ratio, if at least 0.6.
std::optional<std::string> close_match(std::string_view word, const std::vector<std::string>& candidates);

/// What the system says about an errno.
std::string error_text(int error_number);

}  // namespace crt
