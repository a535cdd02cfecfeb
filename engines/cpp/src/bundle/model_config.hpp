// Section "model" of manifest.json: the twin of crt_export/models/declaration.py.
#pragma once

#include <string>
#include <vector>

#include "bundle/json.hpp"
#include "crt_runtime/config.hpp"

namespace crt {

/// How the section breaks the schema of the manifest: types first, then sizes that no session could allocate.
std::vector<std::string> model_problems(const JsonValue& model);

/// Read a section without such problems. Throws Error(bundle): it contradicts itself.
ModelConfig model_config_from_json(const JsonValue& model);

}  // namespace crt
