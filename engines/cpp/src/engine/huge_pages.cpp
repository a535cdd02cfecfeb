#include "engine/huge_pages.hpp"

#include <fstream>
#include <sstream>
#include <string>

#ifdef __linux__
#include <sys/mman.h>
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

}  // namespace crt
