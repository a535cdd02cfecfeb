// The safetensors format: a header of JSON, then the bytes of the tensors. Nothing of a file is trusted.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "bundle/held_files.hpp"
#include "bundle/json.hpp"
#include "crt_runtime/snapshot.hpp"

namespace crt {

/// What is wrong with a file; the caller says which one.
class SafetensorsError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// A file that is open for reading; throws SystemError, JsonError or SafetensorsError.
class SafetensorsFile {
 public:
  /// Reads the header.
  explicit SafetensorsFile(std::shared_ptr<const RegularFile> file);

  /// A string of the metadata; nullptr if it has none of this name.
  const std::string* metadata(const std::string& key) const noexcept;
  /// SHA-256 over the bytes of all tensors in order of their sorted names, in little memory: a file that claims much
  /// and holds nothing costs nothing. Refuses what tensors() does.
  std::string digest() const;
  /// Every tensor, sorted by name. They must fill the file without gap or overlap, and have one of the four dtypes of
  /// this package.
  std::vector<SnapshotTensor> tensors() const;

 private:
  std::shared_ptr<const RegularFile> file_;
  std::uint64_t data_begin_ = 0;
  JsonValue header_;
};

/// Write a file that appears complete or not at all; throws SystemError.
void write_safetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<SnapshotTensor>& tensors);

}  // namespace crt
