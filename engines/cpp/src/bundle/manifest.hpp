// Reading manifest.json: the twin of crt_export/bundle/manifest.py.
#pragma once

#include <string>

#include "bundle/held_folder.hpp"
#include "bundle/json.hpp"

namespace crt {

struct Manifest {
  JsonValue content;     // every key and type that this version relies on is there
  std::string identity;  // SHA-256 of the very bytes that were parsed
};

/// Throws Error(bundle): missing, unreadable, not JSON, of a newer schema, or breaks the schema (all problems listed).
Manifest read_manifest(const HeldFolder& folder);

}  // namespace crt
