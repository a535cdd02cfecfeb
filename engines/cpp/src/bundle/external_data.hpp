// Find the files an ONNX graph points at, without onnx: the twin of crt_export/bundle/external_data.py.
#pragma once

#include <string>
#include <vector>

#include "bundle/held_files.hpp"

namespace crt {

/// A tensor whose data lies outside the graph file.
struct ExternalTensor {
  std::string tensor;    // "" if it has no name
  std::string location;  // as the graph gives it, relative to the graph's folder; not checked
};

/// The tensors of an ONNX file whose data lies in other files, in file order. Initializers, attributes, subgraphs,
/// functions and training graphs are all searched; path is what messages call it. Throws Error(bundle): the file cannot
/// be read, is no ONNX protobuf, or has an external tensor without location.
std::vector<ExternalTensor> external_tensors(const RegularFile& file, const std::string& path);

}  // namespace crt
