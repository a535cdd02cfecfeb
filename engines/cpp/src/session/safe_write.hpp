// A file that appears complete or not at all.
#pragma once

#include <string>
#include <string_view>

namespace crt {

/// Writes beside the path; commit() syncs and renames. Without it nothing remains. Every call may throw SystemError.
/// A link is followed: its target gets the new content. Whatever is no file is refused, never replaced by one.
class SafeWrite {
 public:
  /// mode: who may read and write a new file, as for open(2); one that is there hands on its own permissions.
  explicit SafeWrite(const std::string& path, unsigned int mode = 0666);
  ~SafeWrite();
  SafeWrite(const SafeWrite&) = delete;
  SafeWrite& operator=(const SafeWrite&) = delete;

  void write(std::string_view bytes);
  /// Put the file at its path, in place of what is there.
  void commit();

 private:
  unsigned int mode_;
  bool exists_ = false;
  std::string path_;
  std::string partial_;
  int descriptor_;
};

}  // namespace crt
