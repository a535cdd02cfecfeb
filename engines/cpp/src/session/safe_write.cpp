#include "session/safe_write.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <random>

#include "bundle/paths.hpp"

namespace crt {

namespace {

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

/// A name beside the path that nobody else takes.
std::string partial_name(const std::string& path) {
  std::random_device random;
  char suffix[2 * sizeof(std::uint64_t) + 1];
  std::snprintf(suffix, sizeof suffix, "%08x%08x", random(), random());
  const std::size_t slash = path.find_last_of('/');
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  return folder_of(path) + "/." + name + "." + suffix + ".partial";
}

/// Make a rename last; not every file system can sync a folder.
void sync_folder(const std::string& folder) noexcept {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor >= 0) {
    static_cast<void>(::fsync(descriptor));
    ::close(descriptor);
  }
}

}  // namespace

SafeWrite::SafeWrite(const std::string& path, unsigned int mode)
    : path_(path),
      partial_(partial_name(path)),
      descriptor_(::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode)) {
  if (descriptor_ < 0) {
    throw SystemError(errno);
  }
}

SafeWrite::~SafeWrite() {
  if (descriptor_ >= 0) {
    ::close(descriptor_);
  }
  if (!partial_.empty()) {
    ::unlink(partial_.c_str());
  }
}

void SafeWrite::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) {
      throw SystemError(errno);
    }
    bytes.remove_prefix(written < 0 ? 0 : static_cast<std::size_t>(written));
  }
}

void SafeWrite::commit() {
  if (::fsync(descriptor_) != 0) {
    throw SystemError(errno);
  }
  const int descriptor = descriptor_;
  descriptor_ = -1;
  if (::close(descriptor) != 0 || std::rename(partial_.c_str(), path_.c_str()) != 0) {
    throw SystemError(errno);
  }
  partial_.clear();
  sync_folder(folder_of(path_));
}

}  // namespace crt
