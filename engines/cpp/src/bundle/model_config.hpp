// The model's configuration from "config" of manifest.json: the twin of crt_export/config.py.
#pragma once

#include "bundle/json.hpp"
#include "crt_runtime/config.hpp"

namespace crt {

/// Throws Error(bundle): unknown or missing keys and values that no model of this version has, all at once.
ModelConfig model_config_from_json(const JsonValue& config);

}  // namespace crt
