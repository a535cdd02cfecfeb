// crt_parse_file [PARSER FILE...]: give files to a parser, and say "accepted" or "refused" for each. Without arguments
// it reads lines of "PARSER FILE" from stdin, for validate/fuzz, which gives it thousands.
#include <cstdio>
#include <iostream>
#include <string>

#include "parsers.hpp"

namespace {

void say(const std::string& parser, const std::string& path) {
  std::puts(crt_fuzz::parse(parser, path) ? "accepted" : "refused");
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** values) {
  for (int index = 2; index < count; ++index) say(values[1], values[index]);
  std::string line;
  while (count < 2 && std::getline(std::cin, line)) {
    const std::size_t space = line.find(' ');
    if (space == std::string::npos) return 2;
    say(line.substr(0, space), line.substr(space + 1));
  }
  return 0;
}
