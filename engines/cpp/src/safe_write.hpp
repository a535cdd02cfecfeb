// A file that appears complete or not at all.
#pragma once

#include <string>
#include <string_view>

namespace crt {

/// Writes beside the path; commit() syncs and renames. Without it nothing remains. Every call may throw SystemError.
class SafeWrite {
 public:
  explicit SafeWrite(const std::string& path);
  ~SafeWrite();
  SafeWrite(const SafeWrite&) = delete;
  SafeWrite& operator=(const SafeWrite&) = delete;

  void write(std::string_view bytes);
  /// Put the file at its path, in place of what is there.
  void commit();

 private:
  std::string path_;
  std::string partial_;
  int descriptor_;
};

}  // namespace crt
