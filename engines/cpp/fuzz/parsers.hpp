// Every parser of this library that reads what others wrote, under one name each, for programs that feed them damage.
#pragma once

#include <string>
#include <vector>

namespace crt_fuzz {

/// Names that parse() knows: "manifest", "safetensors", "external_data", "sidecar", "profile", "text".
std::vector<std::string> parser_names();

/// Give a file to a parser. True: it was accepted; false: it was refused by an Error with a message. Any other
/// exception leaves, and what a parser gives that cannot be right ends the program.
bool parse(const std::string& parser, const std::string& path);

}  // namespace crt_fuzz
