// Weights that no longer depend on their file: what is still mapped from it after loading becomes a private copy.
// The twin of crt_export/engine/private_weights.py.
#pragma once

#include <cstdint>
#include <istream>
#include <optional>
#include <vector>

#include "engine/huge_pages.hpp"

namespace crt {

/// Whether mappings can be found and replaced here: on Linux.
bool replaces_mappings() noexcept;

/// Memory that is mapped from a file.
struct FileMapping {
  MemoryRange range;
  std::uint64_t offset = 0;  // where in the file it begins
};

/// Where the file is mapped in this process, in order of addresses; unset where that cannot be found out.
std::optional<std::vector<FileMapping>> mappings_of(int descriptor);

/// Of a /proc/PID/maps: the mappings of the file that `own` is an address of, without the one `own` lies in; unset where
/// `own` is in no file.
std::optional<std::vector<FileMapping>> mappings_beside(std::istream& maps, std::uintptr_t own);

/// Replace every mapping of the file by a copy, but for those of `before`; nobody may unmap them meanwhile. False if the
/// file became shorter, or memory is short; some of it may still be mapped then.
bool make_private(int descriptor, const std::vector<FileMapping>& before);

}  // namespace crt
