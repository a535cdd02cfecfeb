#include "tensorrt/tensorrt_cache.hpp"

#include <cstdlib>
#include <exception>
#include <filesystem>

#include "bundle/held_files.hpp"
#include "bundle/sha256.hpp"
#include "session/safe_write.hpp"

namespace crt {
namespace {

constexpr const char* kMagic = "crt-export tensorrt-rtx cache 1\n";
constexpr std::size_t kMostBytes = std::size_t{1} << 30;

unsigned char nibble(char digit) {
  return static_cast<unsigned char>(digit <= '9' ? digit - '0' : digit - 'a' + 10);
}

std::string bytes_of(const std::string& hex) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(static_cast<char>(nibble(hex[i]) << 4 | nibble(hex[i + 1])));
  }
  return bytes;
}

}  // namespace

std::optional<std::string> runtime_cache_path(const std::string& name) {
  const char* given = std::getenv("XDG_CACHE_HOME");
  std::filesystem::path base;
  if (given != nullptr && std::filesystem::path(given).is_absolute()) {  // XDG: a relative path is to be ignored
    base = given;
  } else {
    const char* home = std::getenv("HOME");
    if (home == nullptr || *home == '\0') return std::nullopt;
    base = std::filesystem::path(home) / ".cache";
  }
  return (base / "crt-export" / "tensorrt-rtx" / (name + ".cache")).string();
}

RuntimeCacheFile::RuntimeCacheFile(const std::string& name) : path_(runtime_cache_path(name)) {}

std::string RuntimeCacheFile::load() noexcept {
  try {
    const std::string content = path_ ? read_file(RegularFile(*path_), kMostBytes).value_or("") : "";
    const std::string magic = kMagic;
    constexpr std::size_t kHashBytes = 32;
    if (content.size() <= magic.size() + kHashBytes) return "";
    std::string body = content.substr(magic.size() + kHashBytes);
    const std::string digest = sha256_hex(body.data(), body.size());
    if (content.compare(0, magic.size() + kHashBytes, magic + bytes_of(digest)) != 0) return "";
    known_ = digest;
    return body;
  } catch (const std::exception&) {  // absent or unreadable: kernels are compiled again
    return "";
  }
}

void RuntimeCacheFile::store(const void* content, std::size_t size) noexcept {
  if (!path_ || size == 0) return;
  try {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::string digest = sha256_hex(content, size);
    if (digest != known_) replace(digest, content, size);
  } catch (const std::exception&) {  // no room or no right to write: the next process compiles again
    return;
  }
}

void RuntimeCacheFile::replace(const std::string& digest, const void* content, std::size_t size) {
  std::filesystem::create_directories(std::filesystem::path(*path_).parent_path());
  SafeWrite file(*path_, 0600);
  file.write(kMagic + bytes_of(digest));
  file.write({static_cast<const char*>(content), size});
  file.commit();
  known_ = digest;
}

}  // namespace crt
