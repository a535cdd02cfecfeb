#include "bundle/held_folder.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "text/messages.hpp"

namespace crt {
namespace {

constexpr int kFolderFlags = O_RDONLY | O_DIRECTORY | O_CLOEXEC;

/// A descriptor that is closed with its scope.
class Descriptor {
 public:
  explicit Descriptor(int number) : number_(number) {
    if (number_ < 0) throw SystemError(errno);
  }
  ~Descriptor() {
    if (number_ >= 0) ::close(number_);
  }
  Descriptor(Descriptor&& other) noexcept : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int number() const noexcept { return number_; }
  int release() noexcept { return std::exchange(number_, -1); }

 private:
  int number_;
};

/// What a folder holds, and whether each is a file, a folder, a link or something else.
void list(int folder, const std::string& prefix, std::vector<std::string>& files, std::vector<std::string>& problems) {
  Descriptor own(::openat(folder, ".", kFolderFlags));
  DIR* entries = ::fdopendir(own.number());
  if (entries == nullptr) throw SystemError(errno);
  own.release();
  const std::unique_ptr<DIR, int (*)(DIR*)> closing(entries, ::closedir);
  while (const dirent* entry = ::readdir(entries)) {
    const std::string plain = entry->d_name;
    if (plain == "." || plain == "..") continue;
    const std::string name = prefix + plain;
    struct stat status {};
    if (::fstatat(folder, plain.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) throw SystemError(errno);
    if (S_ISLNK(status.st_mode)) {
      problems.push_back(in_quotes(name) + " is a link; a bundle holds regular files only");
    } else if (S_ISDIR(status.st_mode)) {
      const Descriptor below(::openat(folder, plain.c_str(), kFolderFlags | O_NOFOLLOW));
      list(below.number(), name + "/", files, problems);
    } else if (S_ISREG(status.st_mode)) {
      files.push_back(name);
    } else {
      problems.push_back(in_quotes(name) + " is not a regular file");
    }
  }
}

}  // namespace

HeldFolder::HeldFolder(std::string path) : path_(std::move(path)), descriptor_(::open(path_.c_str(), kFolderFlags)) {
  if (descriptor_ < 0) throw SystemError(errno);
}

HeldFolder::~HeldFolder() { ::close(descriptor_); }

bool HeldFolder::exchanged() const {
  struct stat held {};
  struct stat now {};
  if (::fstat(descriptor_, &held) != 0 || ::stat(path_.c_str(), &now) != 0) return true;
  return held.st_dev != now.st_dev || held.st_ino != now.st_ino;
}

std::optional<std::string> HeldFolder::problem(const std::string& name) const {
  return file_problem(descriptor_, name);
}

std::shared_ptr<const RegularFile> HeldFolder::open_file(const std::string& name) const {
  std::optional<Descriptor> folder;
  std::size_t begin = 0;
  for (std::size_t slash = name.find('/'); slash != std::string::npos; slash = name.find('/', begin)) {
    const std::string part = name.substr(begin, slash - begin);
    folder = Descriptor(::openat(folder ? folder->number() : descriptor_, part.c_str(), kFolderFlags | O_NOFOLLOW));
    begin = slash + 1;
  }
  return std::make_shared<RegularFile>(folder ? folder->number() : descriptor_, name.substr(begin));
}

std::string HeldFolder::entry_path() const {
#ifdef __linux__
  const std::string held = "/proc/self/fd/" + std::to_string(descriptor_);
  struct stat status {};
  if (::stat(held.c_str(), &status) == 0) return held;
#endif
  return path_;
}

std::vector<std::string> HeldFolder::files(std::vector<std::string>& problems) const {
  std::vector<std::string> files;
  list(descriptor_, "", files, problems);
  std::sort(files.begin(), files.end());
  std::sort(problems.begin(), problems.end());
  return files;
}

bool HeldGraph::unchanged() const {
  return std::all_of(weights.begin(), weights.end(), [](const auto& entry) { return entry.second.unchanged(); });
}

}  // namespace crt
