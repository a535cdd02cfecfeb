// One message for all problems of one kind: the twin of problem_list in crt_export/errors.py.
#pragma once

#include <string>
#include <vector>

namespace crt {

/// The heading with its only problem, or a heading with one bullet per problem; problems must not be empty.
inline std::string problem_list(const std::string& heading, const std::vector<std::string>& problems) {
  if (problems.size() == 1) {
    return heading + ": " + problems.front();
  }
  std::string text = heading + ": " + std::to_string(problems.size()) + " problems";
  for (const std::string& problem : problems) {
    text += "\n  - " + problem;
  }
  return text;
}

}  // namespace crt
