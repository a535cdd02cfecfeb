#include <string>
#include <vector>

#include "bundle/problem_list.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/generation.hpp"
#include "generation/utf8.hpp"

namespace crt {

const char* stop_reason_name(StopReason reason) noexcept {
  switch (reason) {
    case StopReason::running: return "running";
    case StopReason::max_new_tokens: return "max_new_tokens";
    case StopReason::stop_token: return "stop_token";
    case StopReason::stop_string: return "stop_string";
    case StopReason::callback: return "callback";
  }
  return "unknown";
}

void GenerationOptions::check() const {
  std::vector<std::string> problems;
  if (max_new_tokens < 1) {
    problems.push_back("max_new_tokens must be at least 1, found " + std::to_string(max_new_tokens));
  }
  for (const std::int64_t token : stop_tokens) {
    if (token < 0) problems.push_back("stop token id " + std::to_string(token) + " must be at least 0");
  }
  for (const std::string& stop : stop_strings) {
    if (stop.empty()) problems.push_back("stop string '' must be a string of at least one character");
    const std::size_t invalid = first_invalid_utf8(stop);
    if (invalid != std::string::npos) {
      problems.push_back("stop string " + std::to_string(&stop - stop_strings.data()) +
                         " is not valid UTF-8 at byte " + std::to_string(invalid));
    }
  }
  if (passes < kAdaptive) {
    problems.push_back("passes must be at least 1, 0 (the target's own choice), -1 (exact) or -2 (adaptive), found " +
                       std::to_string(passes));
  }
  sampling.check();
  if (!problems.empty()) throw Error(ErrorKind::input, problem_list("generation options", problems));
}

}  // namespace crt
