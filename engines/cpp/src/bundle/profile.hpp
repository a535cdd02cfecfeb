// Targets from "targets" of manifest.json: the twin of crt_export/profile.py and of runtime/opening.py's Target.
#pragma once

#include <string>

#include "bundle/bundle_files.hpp"
#include "bundle/json.hpp"

namespace crt {

/// Read one target.
///
/// name, entry: a member of "targets" that passed the schema; source names it in error messages.
/// Throws Error(bundle): its profile is unusable; every problem is listed.
Target target_from_json(const std::string& name, const JsonValue& entry, const ModelConfig& config,
                        const std::string& source);

}  // namespace crt
