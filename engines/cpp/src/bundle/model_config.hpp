// The model's configuration from "config" of manifest.json: the twin of crt_export/config.py.
#pragma once

#include "bundle/json.hpp"
#include "crt_runtime/config.hpp"

namespace crt {

/// config must be an object. Throws Error(bundle): unknown or missing keys and impossible values, all at once;
/// Error(unsupported): a value is valid in the format and not implemented by this version.
ModelConfig model_config_from_json(const JsonValue& config);

}  // namespace crt
