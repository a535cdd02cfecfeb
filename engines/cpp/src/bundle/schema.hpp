// The schema of manifest.json, version 1: the twin of crt_export/bundle/schema.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle/json.hpp"

namespace crt {

inline constexpr std::int64_t kSchemaVersion = 1;
inline constexpr char kManifestName[] = "manifest.json";
inline constexpr char kToolName[] = "crt-export";

/// Every way in which a parsed manifest breaks the schema; empty if it is sound.
std::vector<std::string> manifest_problems(const JsonValue& manifest);

}  // namespace crt
