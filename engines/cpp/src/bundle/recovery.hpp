// What killed builds leave beside a bundle: recognised, never touched. Putting an old bundle back is for
// crt_export (crt_export/bundle/recovery.py); this library only reads.
#pragma once

#include <optional>
#include <string>
#include <vector>

namespace crt {

/// A folder named ".NAME.partial-PID" (a build) or ".NAME.previous-PID" (the old output).
struct AbandonedFolder {
  std::string file_name;
  std::string name;
  bool partial = false;
};

/// Unset if the last component of path is not named like an abandoned.
std::optional<AbandonedFolder> parse_abandoned(const std::string& path);
/// All abandoned folders of output, sorted by name; links and files named alike are left alone.
std::vector<AbandonedFolder> find_abandoned(const std::string& output);

/// Waits until no build is between the two renames that replace a bundle in this folder, and keeps others from it.
class FolderLock {
 public:
  /// Holds nothing where folders cannot be locked. Throws Error(bundle) if somebody else held the lock for a minute.
  explicit FolderLock(const std::string& folder);
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  int descriptor_;
};

}  // namespace crt
