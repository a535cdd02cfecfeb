#include "engine/memory_map.hpp"

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
namespace {

#ifdef __linux__

constexpr char kMaps[] = "/proc/self/maps";
constexpr char kEnabled[] = "/sys/kernel/mm/transparent_hugepage/enabled";
constexpr char kSize[] = "/sys/kernel/mm/transparent_hugepage/hpage_pmd_size";
constexpr int kCollapse = 25;  // MADV_COLLAPSE, which headers of before Linux 6.1 do not have

constexpr std::uintptr_t kLargest = std::uintptr_t{32} << 20U;  // ARM with pages of 64 KiB has 512 MiB

/// Bytes of a huge page; 0 where there are none, the administrator forbids them, or they would be mostly empty.
std::uintptr_t huge_page_size() {
  std::ifstream enabled(kEnabled);
  std::string setting;
  if (!std::getline(enabled, setting) || setting.find("[never]") != std::string::npos) return 0;
  std::ifstream file(kSize);
  std::uintptr_t size = 0;
  return file >> size && size <= kLargest ? size : 0;
}

std::vector<MemoryRange> own_memory() {
  std::ifstream maps(kMaps);
  return private_memory(maps);
}

void collapse(MemoryRange range, std::uintptr_t size) {
  const std::uintptr_t begin = (range.first + size - 1) / size * size;
  const std::uintptr_t end = range.second / size * size;
  if (begin < end) {
    // An error: some of it stays as it was, which is no harm.
    static_cast<void>(madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse));
  }
}

#endif

}  // namespace

void allocated_in_huge_pages(bool wanted, const std::function<void()>& load) {
#ifdef __linux__
  const std::uintptr_t size = wanted ? huge_page_size() : 0;
  const std::vector<MemoryRange> before = size == 0 ? std::vector<MemoryRange>{} : own_memory();
  load();
  if (size == 0) return;
  for (const MemoryRange& range : without(own_memory(), before)) collapse(range, size);
#else
  static_cast<void>(wanted);
  load();
#endif
}

std::vector<MemoryRange> private_memory(std::istream& maps) {
  std::vector<MemoryRange> found;
  for (std::string line; std::getline(maps, line);) {
    std::istringstream fields(line);
    MemoryRange range;
    char dash = 0;
    std::string access, offset, device, inode;
    fields >> std::hex >> range.first >> dash >> range.second >> access >> offset >> device >> inode;
    if (fields && access.rfind("rw", 0) == 0 && access.back() == 'p' && inode == "0") found.push_back(range);
  }
  return found;
}

std::vector<MemoryRange> without(const std::vector<MemoryRange>& ranges, const std::vector<MemoryRange>& taken) {
  std::vector<MemoryRange> left;
  for (auto [begin, end] : ranges) {
    for (const auto& [taken_begin, taken_end] : taken) {
      if (taken_end <= begin || end <= taken_begin) continue;
      if (begin < taken_begin) left.emplace_back(begin, taken_begin);
      begin = taken_end;
    }
    if (begin < end) left.emplace_back(begin, end);
  }
  return left;
}

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
