#include "bundle/held_files.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <utility>
#include <vector>

#include "bundle/sha256.hpp"
#include "text/messages.hpp"

namespace crt {

namespace {

constexpr std::size_t kMaxNameLength = 1024;
constexpr std::size_t kMaxPartLength = 255;
constexpr std::size_t kChunkBytes = std::size_t{1} << 18U;

std::int64_t nanoseconds(const timespec& time) {
  return static_cast<std::int64_t>(time.tv_sec) * 1000000000 + static_cast<std::int64_t>(time.tv_nsec);
}

FileState state_of(const struct stat& status) {
  FileState state;
  state.device = static_cast<std::uint64_t>(status.st_dev);
  state.inode = static_cast<std::uint64_t>(status.st_ino);
  state.size = static_cast<std::uint64_t>(status.st_size);
#ifdef __APPLE__
  state.modified_ns = nanoseconds(status.st_mtimespec);
  state.changed_ns = nanoseconds(status.st_ctimespec);
#else
  state.modified_ns = nanoseconds(status.st_mtim);
  state.changed_ns = nanoseconds(status.st_ctim);
#endif
  return state;
}

std::size_t character_count(const std::string& text) {
  const auto starts_one = [](char byte) { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U; };
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), starts_one));
}

std::vector<std::string> components(const std::string& name) {
  std::vector<std::string> parts(1);
  for (const char character : name) {
    if (character == '/') {
      parts.emplace_back();
    } else {
      parts.back() += character;
    }
  }
  return parts;
}

/// Printable ASCII, but for what Windows or a shell reads as something else.
bool is_allowed(char character) {
  const auto byte = static_cast<unsigned char>(character);
  return byte >= 0x20 && byte < 0x7F && std::string_view("\\:*?\"<>|").find(character) == std::string_view::npos;
}

/// The character of UTF-8 text that begins at a byte.
std::string character_at(const std::string& text, std::size_t begin) {
  std::size_t end = begin + 1;
  while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) ++end;
  return text.substr(begin, end - begin);
}

std::string lower(std::string text) {
  for (char& character : text) {
    if (character >= 'A' && character <= 'Z') character = static_cast<char>(character - 'A' + 'a');
  }
  return text;
}

/// CON, COM1 and their like, with or without an ending.
bool is_windows_device(const std::string& part) {
  std::string stem = lower(part.substr(0, part.find('.')));
  stem.erase(stem.find_last_not_of(' ') + 1);
  const std::array<std::string_view, 6> plain{"con", "prn", "aux", "nul", "conin$", "conout$"};
  if (std::find(plain.begin(), plain.end(), stem) != plain.end()) return true;
  return stem.size() == 4 && stem[3] >= '0' && stem[3] <= '9' &&
         (stem.compare(0, 3, "com") == 0 || stem.compare(0, 3, "lpt") == 0);
}

}  // namespace

SystemError::SystemError(int error_number) : std::runtime_error(error_text(error_number)), number_(error_number) {}
SystemError::SystemError(int error_number, const char* reason) : std::runtime_error(reason), number_(error_number) {}

bool FileState::operator==(const FileState& other) const noexcept {
  return device == other.device && inode == other.inode && size == other.size && modified_ns == other.modified_ns &&
         changed_ns == other.changed_ns;
}

RegularFile::RegularFile(const std::string& path) : RegularFile(AT_FDCWD, path) {}

RegularFile::RegularFile(int folder, const std::string& name)
    : descriptor_(::openat(folder, name.c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)) {
  if (descriptor_ < 0) throw SystemError(errno);
  struct stat status {};
  const int problem = ::fstat(descriptor_, &status) != 0 ? errno : 0;
  if (problem == 0 && S_ISREG(status.st_mode)) return;
  ::close(descriptor_);
  if (problem != 0) throw SystemError(problem);
  throw SystemError(EINVAL, "is not a regular file");
}

RegularFile::~RegularFile() { ::close(descriptor_); }

FileState RegularFile::state() const {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0) throw SystemError(errno);
  return state_of(status);
}

std::size_t RegularFile::read(void* buffer, std::size_t count, std::uint64_t offset) const {
  std::size_t done = 0;
  while (done < count) {
    const ssize_t got = ::pread(descriptor_, static_cast<char*>(buffer) + done, count - done,
                                static_cast<off_t>(offset + static_cast<std::uint64_t>(done)));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw SystemError(errno);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

std::optional<std::string> name_problem(const std::string& name) {
  const std::size_t length = character_count(name);
  if (length == 0 || length > kMaxNameLength) {
    return "must have 1 to " + std::to_string(kMaxNameLength) + " characters, has " + std::to_string(length);
  }
  if (name.front() == '/') return "is an absolute path; only paths relative to the bundle are allowed";
  const auto bad = std::find_if_not(name.begin(), name.end(), is_allowed);
  if (bad != name.end()) {
    return "contains " + in_quotes(character_at(name, static_cast<std::size_t>(bad - name.begin()))) +
           "; use '/' between folders, no drive letter or control character, and of other characters only those of "
           "ASCII";
  }
  for (const std::string& part : components(name)) {
    if (part.empty() || part == "." || part == "..") {
      return "contains the path component " + in_quotes(part) + ", which could lead out of the bundle";
    }
    if (part.back() == '.' || part.back() == ' ') {
      return "contains " + in_quotes(part) + ", which ends in a dot or a space (Windows drops those)";
    }
    if (part.size() > kMaxPartLength) {
      return "contains a component of " + std::to_string(part.size()) + " characters; file systems take " +
             std::to_string(kMaxPartLength);
    }
    if (is_windows_device(part)) return "contains " + in_quotes(part) + ", which is a device on Windows";
  }
  return std::nullopt;
}

std::vector<std::string> collision_problems(const std::vector<std::string>& names) {
  std::map<std::string, std::string> spelled;
  std::vector<std::string> problems;
  for (const std::string& name : names) {
    for (std::size_t end = name.find('/'); ; end = name.find('/', end + 1)) {
      const std::string path = name.substr(0, end);
      const std::string& first = spelled.emplace(lower(path), path).first->second;
      if (first != path) {
        problems.push_back(in_quotes(first) + " and " + in_quotes(path) +
                           " differ in upper and lower case only: other systems take them for one");
        break;
      }
      if (end == std::string::npos) break;
    }
  }
  return problems;
}

std::optional<std::string> file_problem(int folder, const std::string& name) {
  const std::vector<std::string> parts = components(name);
  std::string walked;
  for (const std::string& part : parts) {
    walked += (walked.empty() ? "" : "/") + part;
    const bool last = walked.size() == name.size();
    struct stat status {};
    if (::fstatat(folder, walked.c_str(), &status, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT || errno == ENOTDIR) return "is missing";
      return "cannot be read (" + error_text(errno) + ")";
    }
    if (S_ISLNK(status.st_mode)) {
      return "goes through a link (" + in_quotes(walked) + "); a bundle holds regular files only";
    }
    if (!last && !S_ISDIR(status.st_mode)) return "is missing (" + in_quotes(walked) + " is not a folder)";
    if (last && !S_ISREG(status.st_mode)) return "is not a regular file";
  }
  return std::nullopt;
}

HashedFile hash_file(const RegularFile& file) {
  const FileState before = file.state();
  Sha256 digest;
  std::vector<char> chunk(kChunkBytes);
  std::uint64_t offset = 0;
  while (const std::size_t got = file.read(chunk.data(), chunk.size(), offset)) {
    digest.update(chunk.data(), got);
    offset += got;
  }
  if (file.state() != before) throw SystemError(ESTALE, "changed while it was read");
  return {digest.hex(), before};
}

std::optional<std::string> read_file(const RegularFile& file, std::size_t most) {
  const std::uint64_t size = file.state().size;
  if (size > most) return std::nullopt;
  std::string content(static_cast<std::size_t>(size), '\0');
  content.resize(file.read(content.data(), content.size(), 0));
  return content;
}

std::string real_path(const std::string& path) {
  namespace fs = std::filesystem;
  std::error_code problem;
  const fs::path absolute = fs::absolute(path.empty() ? "." : path, problem);
  if (problem) return path;
  fs::path resolved = fs::weakly_canonical(absolute, problem);
  if (problem) resolved = absolute.lexically_normal();
  return (resolved.has_filename() ? resolved : resolved.parent_path()).string();
}

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
