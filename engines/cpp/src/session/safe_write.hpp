// A file that appears complete or not at all.
#pragma once

#include <string>
#include <string_view>

namespace crt {

/// Writes beside the path; commit() syncs and renames. Without it nothing remains. Every call may throw SystemError.
class SafeWrite {
 public:
  /// mode: who may read and write the file, as for open(2).
  explicit SafeWrite(const std::string& path, unsigned int mode = 0666);
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
