// Memory of this process, found in /proc/self/maps: weights in huge pages, because a decode step reads all of them
// once and with pages of 4 KiB waits for the page table too; and weights that no longer depend on their file, because
// what is still mapped from it after loading becomes a private copy.
// The C++ twin of crt_export/engine/memory_map.py.
#pragma once

#include <cstdint>
#include <functional>
#include <istream>
#include <optional>
#include <utility>
#include <vector>

namespace crt {

/// Addresses [first, second).
using MemoryRange = std::pair<std::uintptr_t, std::uintptr_t>;

/// What the process allocates in `load` lies in huge pages afterwards, as far as the system has them to give: on Linux
/// from 6.1, about 5 ms per 2 MiB, once. Elsewhere, or where it is not `wanted`, this is a call of `load`.
void allocated_in_huge_pages(bool wanted, const std::function<void()>& load);

/// The writable memory that belongs to one process alone and to no file, in order; `maps` is a /proc/PID/maps.
std::vector<MemoryRange> private_memory(std::istream& maps);

/// What of `ranges` lies in none of `taken`; both are in order, and so is the result.
std::vector<MemoryRange> without(const std::vector<MemoryRange>& ranges, const std::vector<MemoryRange>& taken);

/// Whether mappings can be found and replaced here: on Linux.
bool replaces_mappings() noexcept;

/// Memory that is mapped from a file.
struct FileMapping {
  MemoryRange range;
  std::uint64_t offset = 0;  // where in the file it begins
};

/// Where the file is mapped in this process, in order of addresses; unset where that cannot be found out.
std::optional<std::vector<FileMapping>> mappings_of(int descriptor);

/// Of a /proc/PID/maps: the mappings of the file that `own` is an address of, without the one `own` lies in; unset
/// where `own` is in no file.
std::optional<std::vector<FileMapping>> mappings_beside(std::istream& maps, std::uintptr_t own);

/// Replace every mapping of the file by a copy, but for those of `before`; nobody may unmap them meanwhile. False if
/// the file became shorter, or memory is short; some of it may still be mapped then.
bool make_private(int descriptor, const std::vector<FileMapping>& before);

}  // namespace crt
