// Reading manifest.json and its schema, version 1: the twin of crt_export/bundle/manifest.py and schema.py.
#pragma once

#include <cstdint>
#include <string>

#include "bundle/held_files.hpp"
#include "bundle/json.hpp"

namespace crt {

inline constexpr std::int64_t kSchemaVersion = 1;
inline constexpr char kManifestName[] = "manifest.json";
inline constexpr char kToolName[] = "crt-export";

struct Manifest {
  JsonValue content;     // every key and type that this version relies on is there
  std::string identity;  // SHA-256 of the very bytes that were parsed
};

/// Throws Error(bundle): missing, unreadable, not JSON, of a newer schema, or breaks the schema (all problems listed).
Manifest read_manifest(const HeldFolder& folder);

}  // namespace crt
