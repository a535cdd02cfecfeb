#include "session/safe_write.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <random>
#include <string>

#include "bundle/held_files.hpp"

namespace crt {
namespace {

constexpr std::size_t kShownBytes = 16;  // of the name: all of it might make a name that is too long
constexpr int kMostLinks = 40;           // as Linux itself follows

std::string folder_of(const std::string& path) {
  const std::size_t slash = path.find_last_of('/');
  return slash == std::string::npos ? "." : path.substr(0, slash + 1);
}

const char* kind_problem(mode_t mode) {
  if (S_ISDIR(mode)) return "it is a folder, expected a file or a free name";
  if (S_ISFIFO(mode)) return "it is a pipe, expected a file or a free name";
  if (S_ISSOCK(mode)) return "it is a socket, expected a file or a free name";
  return "it is a device, expected a file or a free name";
}

std::string target_of_link(const std::string& path) {
  std::string target(4096, '\0');
  const ssize_t length = ::readlink(path.c_str(), target.data(), target.size());
  if (length < 0) throw SystemError(errno);
  target.resize(static_cast<std::size_t>(length));
  return !target.empty() && target.front() == '/' ? target : folder_of(path) + "/" + target;
}

/// The file that a path names in the end, links followed, and its permissions; mode where there is none yet.
/// A folder, a pipe, a socket or a device is refused: it would be replaced by a file.
std::string followed(std::string path, unsigned int* mode, bool* exists) {
  for (int links = 0; links <= kMostLinks; ++links) {
    struct stat status {};
    if (::lstat(path.c_str(), &status) != 0) {
      if (errno != ENOENT) throw SystemError(errno);
      *exists = false;
      return path;
    }
    if (S_ISREG(status.st_mode)) {
      *exists = true;
      *mode = status.st_mode & 0777U;
      return path;
    }
    if (!S_ISLNK(status.st_mode)) {
      throw SystemError(S_ISDIR(status.st_mode) ? EISDIR : EINVAL, kind_problem(status.st_mode));
    }
    path = target_of_link(path);
  }
  throw SystemError(ELOOP);
}

/// A name beside the path that nobody else takes.
std::string partial_name(const std::string& path) {
  std::random_device random;
  char suffix[2 * sizeof(std::uint64_t) + 1];
  std::snprintf(suffix, sizeof suffix, "%08x%08x", random(), random());
  const std::size_t slash = path.find_last_of('/');
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  return folder_of(path) + "/." + name.substr(0, kShownBytes) + "." + suffix + ".partial";
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
    : mode_(mode),
      path_(followed(path, &mode_, &exists_)),
      partial_(partial_name(path_)),
      descriptor_(::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode_)) {
  if (descriptor_ < 0) throw SystemError(errno);
}

SafeWrite::~SafeWrite() {
  if (descriptor_ >= 0) ::close(descriptor_);
  if (!partial_.empty()) ::unlink(partial_.c_str());
}

void SafeWrite::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::write(descriptor_, bytes.data(), bytes.size());
    if (written < 0 && errno != EINTR) throw SystemError(errno);
    bytes.remove_prefix(written < 0 ? 0 : static_cast<std::size_t>(written));
  }
}

void SafeWrite::commit() {
  if ((exists_ && ::fchmod(descriptor_, static_cast<mode_t>(mode_)) != 0) || ::fsync(descriptor_) != 0) {
    throw SystemError(errno);
  }
  const int descriptor = descriptor_;
  descriptor_ = -1;
  if (::close(descriptor) != 0 || std::rename(partial_.c_str(), path_.c_str()) != 0) throw SystemError(errno);
  partial_.clear();
  sync_folder(folder_of(path_));
}

}  // namespace crt
