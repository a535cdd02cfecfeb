#include "engine/private_weights.hpp"

#include <fstream>
#include <sstream>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#endif

namespace crt {

std::optional<std::vector<FileMapping>> mappings_beside(std::istream& maps, std::uintptr_t own) {
  struct Line {
    FileMapping mapping;
    std::string file;  // device and inode
  };
  std::vector<Line> lines;
  std::string wanted;
  for (std::string text; std::getline(maps, text);) {
    std::istringstream fields(text);
    Line line;
    char dash = 0;
    std::string access, device, inode;
    fields >> std::hex >> line.mapping.range.first >> dash >> line.mapping.range.second >> access >>
        line.mapping.offset >> device >> inode;
    if (!fields || inode == "0") continue;
    line.file = device + " " + inode;
    if (line.mapping.range.first <= own && own < line.mapping.range.second) {
      wanted = line.file;
    } else {
      lines.push_back(std::move(line));
    }
  }
  if (wanted.empty()) return std::nullopt;
  std::vector<FileMapping> found;
  for (const Line& line : lines) {
    if (line.file == wanted) found.push_back(line.mapping);
  }
  return found;
}

#ifdef __linux__

namespace {

bool read_all(int descriptor, char* target, std::size_t size, std::uint64_t offset) {
  for (std::size_t done = 0; done < size;) {
    const ssize_t got = ::pread(descriptor, target + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    done += static_cast<std::size_t>(got);
  }
  return true;
}

/// Put a copy of a piece of the file at these addresses.
bool replace(int descriptor, MemoryRange range, std::uint64_t offset) {
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) return false;
  const std::size_t size = range.second - range.first;
  void* copy = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (copy == MAP_FAILED) return false;
  const auto file_size = static_cast<std::uint64_t>(status.st_size);
  const std::uint64_t held = offset < file_size ? file_size - offset : 0;
  const auto wanted = static_cast<std::size_t>(std::min<std::uint64_t>(size, held));
  if (read_all(descriptor, static_cast<char*>(copy), wanted, offset) &&
      ::mremap(copy, size, size, MREMAP_MAYMOVE | MREMAP_FIXED, reinterpret_cast<void*>(range.first)) != MAP_FAILED) {
    return true;
  }
  ::munmap(copy, size);
  return false;
}

}  // namespace

bool replaces_mappings() noexcept { return true; }

std::optional<std::vector<FileMapping>> mappings_of(int descriptor) {
  struct stat status {};
  if (::fstat(descriptor, &status) != 0) return std::nullopt;
  if (status.st_size == 0) return std::vector<FileMapping>{};
  // File systems in layers show another device in /proc than in fstat: mapped once more, the file shows its name there.
  void* probe = ::mmap(nullptr, 1, PROT_READ, MAP_SHARED, descriptor, 0);
  if (probe == MAP_FAILED) return std::nullopt;
  std::ifstream maps("/proc/self/maps");
  std::optional<std::vector<FileMapping>> found = mappings_beside(maps, reinterpret_cast<std::uintptr_t>(probe));
  ::munmap(probe, 1);
  return found;
}

bool make_private(int descriptor, const std::vector<FileMapping>& before) {
  std::vector<MemoryRange> taken;
  for (const FileMapping& mapping : before) taken.push_back(mapping.range);
  const std::optional<std::vector<FileMapping>> mapped = mappings_of(descriptor);
  if (!mapped) return false;
  for (const FileMapping& mapping : *mapped) {
    for (const MemoryRange& range : without({mapping.range}, taken)) {
      if (!replace(descriptor, range, mapping.offset + (range.first - mapping.range.first))) return false;
    }
  }
  return true;
}

#else

bool replaces_mappings() noexcept { return false; }
std::optional<std::vector<FileMapping>> mappings_of(int /*descriptor*/) { return std::nullopt; }
bool make_private(int /*descriptor*/, const std::vector<FileMapping>& /*before*/) { return false; }

#endif

}  // namespace crt
