// What makes an engine profile impossible: the twin of crt_export/profile.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle/json.hpp"

namespace crt {

/// Most CPU threads of a profile or a session.
inline constexpr std::int64_t kMostThreads = 1024;

/// Every problem of a profile, which must be an object: unknown and missing keys, impossible values.
std::vector<std::string> profile_problems(const JsonValue& profile);

}  // namespace crt
