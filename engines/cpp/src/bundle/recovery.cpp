#include "bundle/recovery.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>

#include "crt_runtime/error.hpp"

namespace crt {
namespace {

namespace fs = std::filesystem;

constexpr std::chrono::seconds kLockTime{60};
constexpr std::chrono::milliseconds kLockPause{20};
constexpr std::size_t kMostPidDigits = 10;

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() > end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

}  // namespace

std::optional<AbandonedFolder> parse_abandoned(const std::string& path) {
  const std::string file_name = fs::path(path).filename().string();
  const std::size_t dash = file_name.rfind('-');
  if (dash == std::string::npos || file_name.front() != '.') return std::nullopt;
  const std::string pid = file_name.substr(dash + 1);
  const bool digits = pid.find_first_not_of("0123456789") == std::string::npos;
  if (pid.empty() || pid.size() > kMostPidDigits || !digits) return std::nullopt;
  const std::string stem = file_name.substr(1, dash - 1);
  for (const char* kind : {".partial", ".previous"}) {
    if (ends_with(stem, kind)) {
      return AbandonedFolder{file_name, stem.substr(0, stem.size() - std::string(kind).size()), kind[2] == 'a'};
    }
  }
  return std::nullopt;
}

std::vector<AbandonedFolder> find_abandoned(const std::string& output) {
  const fs::path path(output);
  std::vector<AbandonedFolder> found;
  std::error_code problem;  // an absent or unreadable parent is reported by whoever needs it
  fs::directory_iterator entries(path.parent_path(), problem);
  while (!problem && entries != fs::directory_iterator()) {
    std::optional<AbandonedFolder> abandoned = parse_abandoned(entries->path().string());
    std::error_code status_problem;
    const bool folder = entries->symlink_status(status_problem).type() == fs::file_type::directory;
    if (abandoned && abandoned->name == path.filename().string() && folder) found.push_back(*std::move(abandoned));
    entries.increment(problem);
  }
  std::sort(found.begin(), found.end(), [](const auto& a, const auto& b) { return a.file_name < b.file_name; });
  return found;
}

FolderLock::FolderLock(const std::string& folder)
    : descriptor_(::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC)) {
  const auto deadline = std::chrono::steady_clock::now() + kLockTime;
  // shared: readers do not keep each other waiting
  while (descriptor_ >= 0 && ::flock(descriptor_, LOCK_SH | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK && errno != EINTR) return;
    if (std::chrono::steady_clock::now() > deadline) {
      ::close(descriptor_);
      throw Error(ErrorKind::bundle, "another program has locked " + folder + " for " +
                                         std::to_string(kLockTime.count()) +
                                         " s: wait for it or end it, then try again");
    }
    std::this_thread::sleep_for(kLockPause);
  }
}

FolderLock::~FolderLock() {
  if (descriptor_ >= 0) ::close(descriptor_);
}

}  // namespace crt
