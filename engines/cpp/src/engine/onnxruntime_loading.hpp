// From a held graph of a bundle to a session of ONNX Runtime: the bytes that were hashed are the bytes that are loaded.
// The twin of crt_export/engine/ort.py, which says why it is done so.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <functional>

#include "bundle/held_files.hpp"

namespace crt {

/// Makes a session of a graph's bytes with the options given, after its own.
using LoadGraph =
    std::function<Ort::Session(const std::string& model, const std::function<void(Ort::SessionOptions&)>&)>;

/// keep_mapped: whether weights may stay mapped from their file. Throws what load throws, and Error(bundle) where a
/// weight file is no longer what the manifest says.
Ort::Session load_held_graph(const HeldGraph& graph, const LoadGraph& load, bool keep_mapped);

}  // namespace crt
