// How often a thread has asked for memory: operator new is replaced in the program of the tests.
#pragma once

#include <cstddef>

namespace crt_test {

/// Calls of operator new by this thread so far, those inside shared libraries included.
std::size_t allocations() noexcept;

/// The allocation of this thread after that many more finds no memory, once. ONNX Runtime's own do not count: it frees
/// memory twice where one of its allocations fails (1.31, in Run()), which no program around it can mend.
void fail_allocation_after(std::size_t others) noexcept;

/// Whether that allocation was asked for; none fails from now on.
bool take_failed_allocation() noexcept;

/// From now on operator new of this thread finds no memory, or finds it again.
void exhaust_memory(bool exhausted) noexcept;

}  // namespace crt_test
