// Weights in huge pages: a decode step reads all of them once, and with pages of 4 KiB waits for the page table too.
// The C++ twin of crt_export/engine/huge_pages.py.
#pragma once

#include <cstdint>
#include <functional>
#include <istream>
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

}  // namespace crt
