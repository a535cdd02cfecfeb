// The sidecar of a TensorRT engine: what crt_export/engine/tensorrt/build.py writes beside it.
#pragma once

#include <string>

#include "bundle/bundle_files.hpp"

namespace crt {

/// content: the file's bytes; source names it in messages. Throws Error(bundle), every problem listed.
EngineSidecar sidecar_from_json(const std::string& content, const std::string& source);

}  // namespace crt
