#include "allocation_count.hpp"

#include <execinfo.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

thread_local std::size_t count = 0;
thread_local bool exhausted = false;
thread_local bool failing = false;
thread_local std::size_t others = 0;  // allocations before the one that fails
thread_local bool failed = false;

/// Where a library lies in memory.
struct AddressRange {
  std::uintptr_t begin = 0;
  std::uintptr_t end = 0;
  bool holds(const void* address) const noexcept {
    const auto value = reinterpret_cast<std::uintptr_t>(address);
    return begin <= value && value < end;
  }
};
struct Libraries {
  AddressRange program;
  AddressRange onnxruntime;
};

int note_library(dl_phdr_info* info, std::size_t, void* found) noexcept {
  auto& libraries = *static_cast<Libraries*>(found);
  const bool program = info->dlpi_name[0] == '\0';
  if (!program && std::strstr(info->dlpi_name, "libonnxruntime") == nullptr) return 0;
  AddressRange& range = program ? libraries.program : libraries.onnxruntime;
  if (range.end != 0) return 0;
  range.begin = info->dlpi_addr;
  for (int index = 0; index < info->dlpi_phnum; ++index) {
    const auto& segment = info->dlpi_phdr[index];
    const auto end = static_cast<std::uintptr_t>(info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
    if (segment.p_type == PT_LOAD && end > range.end) range.end = end;
  }
  return 0;
}

/// Whether ONNX Runtime asked, itself or through the standard library.
bool is_from_onnxruntime(const void* caller) noexcept {
  static const Libraries libraries = [] {
    Libraries found;
    dl_iterate_phdr(note_library, &found);
    return found;
  }();
  if (libraries.program.holds(caller)) return false;
  if (libraries.onnxruntime.holds(caller)) return true;
  constexpr int kMostFrames = 12;
  void* frames[kMostFrames];
  const int depth = backtrace(frames, kMostFrames);
  for (int index = 3; index < depth; ++index) {
    if (libraries.onnxruntime.holds(frames[index])) return true;
  }
  return false;
}

/// Whether this is the allocation that fails.
bool fails_now(const void* caller) noexcept {
  if (!failing || is_from_onnxruntime(caller)) return false;
  if (others > 0) {
    --others;
    return false;
  }
  failing = false;
  failed = true;
  return true;
}

void* counted_or_null(std::size_t bytes, std::size_t alignment, const void* caller) noexcept {
  ++count;
  if (exhausted) {
    return nullptr;
  }
  if (fails_now(caller)) {
    return nullptr;
  }
  bytes = bytes == 0 ? 1 : bytes;
  return alignment <= alignof(std::max_align_t)
             ? std::malloc(bytes)
             : std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
}

void* counted(std::size_t bytes, std::size_t alignment, const void* caller) {
  void* memory = counted_or_null(bytes, alignment, caller);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

std::size_t crt_test::allocations() noexcept { return count; }
void crt_test::fail_allocation_after(std::size_t others_before) noexcept {
  failing = true;
  failed = false;
  others = others_before;
}
bool crt_test::take_failed_allocation() noexcept {
  failing = false;
  return failed;
}
void crt_test::exhaust_memory(bool now) noexcept { exhausted = now; }

// Every form, though the standard ones call the first: a sanitizer brings its own, whose memory free() must not get.
void* operator new(std::size_t bytes) { return counted(bytes, 1, __builtin_return_address(0)); }
void* operator new[](std::size_t bytes) { return counted(bytes, 1, __builtin_return_address(0)); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return counted(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return counted_or_null(bytes, 1, __builtin_return_address(0));
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return counted_or_null(bytes, 1, __builtin_return_address(0));
}
void* operator new(std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return counted_or_null(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  return counted_or_null(bytes, static_cast<std::size_t>(alignment), __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t, const std::nothrow_t&) noexcept { std::free(memory); }
