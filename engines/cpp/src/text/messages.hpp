// How error messages show lists, names and values.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "crt_runtime/error.hpp"

namespace crt {

class JsonValue;

std::string joined(const std::vector<std::string>& parts, std::string_view separator = ", ");

/// A shape or another list of numbers: "[1, 2]".
std::string list_text(const std::vector<std::int64_t>& numbers);

/// The heading with its only problem, or a heading with one bullet per problem; problems must not be empty.
std::string problem_list(const std::string& heading, const std::vector<std::string>& problems);

/// Throws an Error of that kind with all problems, unless there is none; the heading may allocate even then.
void refuse_problems(ErrorKind kind, const std::string& heading, const std::vector<std::string>& problems);

/// The first count characters of a text in quotes, on one line and with nothing that steers a terminal.
std::string in_quotes(std::string_view text, std::size_t count = 200);

/// A value of a JSON file: scalars as they are written there, of lists and objects what they are.
std::string shown(const JsonValue& value);

/// What the system says about an errno.
std::string error_text(int error_number);

}  // namespace crt
