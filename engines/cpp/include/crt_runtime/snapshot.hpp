// Everything a session holds, in memory or in a file that Python and C++ read alike.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// One tensor of a snapshot, bytes little-endian in row-major order.
struct SnapshotTensor {
  std::string name;
  std::string dtype;  ///< safetensors name: "I64", "F32", "F16", "U8"
  std::vector<std::int64_t> shape;
  std::vector<unsigned char> data;
};

/// Made by Session::snapshot(); the format is described in crt_export/runtime/snapshot.py.
struct Snapshot {
  std::string bundle;  ///< identity of the bundle: SHA-256 of its manifest.json, hex
  std::string target;
  std::vector<SnapshotTensor> tensors;

  /// Writes a safetensors file, beside the path first and then renamed. Throws Error(input) if it cannot be written.
  void save(const std::string& path) const;
  /// Throws Error(bundle) if the file is missing, damaged, hostile, or of a newer format version.
  static Snapshot load(const std::string& path);
};

}  // namespace crt
