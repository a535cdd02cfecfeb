// Kernels that TensorRT-RTX compiled on this machine, kept in the user's cache folder for the next process. Shares its
// files with crt_export/engine/tensorrt/engine.py.
#pragma once

#include <cstddef>
#include <mutex>
#include <optional>
#include <string>

namespace crt {

/// Where the cache of this name lies: in $XDG_CACHE_HOME or ~/.cache; unset where there is no home folder.
std::optional<std::string> runtime_cache_path(const std::string& name);

/// One cache file. Nothing depends on it: one that is damaged or cannot be read is as good as none, and one that cannot
/// be written is lost. A damaged file never reaches the runtime: it begins with the hash of what follows.
class RuntimeCacheFile {
 public:
  explicit RuntimeCacheFile(const std::string& name);

  /// What store() wrote; empty if there is nothing or it is damaged.
  std::string load() noexcept;
  /// Replace the file in one step, readable by its owner only, if the content is new. Safe to call from several
  /// threads.
  void store(const void* content, std::size_t size) noexcept;

 private:
  void replace(const std::string& digest, const void* content, std::size_t size);

  std::optional<std::string> path_;
  std::mutex mutex_;
  std::string known_;  // hash of the content that the file has
};

}  // namespace crt
