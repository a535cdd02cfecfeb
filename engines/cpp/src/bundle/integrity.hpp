// Digests by which manifest.json protects itself: the twin of crt_export/bundle/manifest.py, which describes them.
#pragma once

#include <optional>
#include <string>

#include "bundle/json.hpp"

namespace crt {

/// What is wrong with everything but the table of files; unset if it is as it was written.
std::optional<std::string> integrity_problem(const JsonValue& manifest);
/// Whether the table of files is the one that a manifest without integrity_problem() was written with.
bool files_are_as_written(const JsonValue& manifest);

/// The bytes that stand for a JSON value.
std::string canonical(const JsonValue& value);
/// The two digests of a manifest as it is.
struct ManifestDigests {
  std::string manifest;
  std::string files;
};
ManifestDigests manifest_digests(const JsonValue& manifest);

}  // namespace crt
