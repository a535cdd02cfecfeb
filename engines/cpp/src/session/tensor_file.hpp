// Safetensors files of this package: a format with a version and a checksum over its tensors.
// The C++ twin of crt_export/runtime/tensor_file.py.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle/held_files.hpp"
#include "crt_runtime/snapshot.hpp"

namespace crt {

/// What a file is, and which versions of it are read.
struct TensorFileKind {
  std::string format;                 ///< metadata "format"
  std::int64_t version = 1;           ///< newest "format_version" that is read, and the one that is written
  std::string title;                  ///< what messages call it, with its article
  std::vector<std::string> required;  ///< metadata besides format, format_version and sha256
};

/// A file that was read: its required metadata and its tensors, sorted by name.
struct TensorFile {
  std::map<std::string, std::string> metadata;
  std::vector<SnapshotTensor> tensors;
};

/// Read a file, a link is followed, and compare its checksum before its tensors take memory; what the tensors are
/// worth, the caller finds out. Throws SystemError where it cannot be read, Error(bundle) where it is damaged,
/// something else, or of a newer format version.
TensorFile read_tensor_file(const TensorFileKind& kind, const std::string& path);
/// The same of a file that is open; path is what messages call it.
TensorFile read_tensor_file(const TensorFileKind& kind, const std::string& path,
                            std::shared_ptr<const RegularFile> file);

/// Write a file that appears complete or not at all; metadata are the required ones. Throws SystemError.
void write_tensor_file(const TensorFileKind& kind, const std::string& path,
                       std::map<std::string, std::string> metadata, const std::vector<SnapshotTensor>& tensors);

}  // namespace crt
