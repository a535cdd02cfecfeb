// How often a thread has asked for memory: operator new is replaced in the program of the tests.
#pragma once

#include <cstddef>

namespace crt_test {

/// Calls of operator new by this thread so far, those inside shared libraries included.
std::size_t allocations() noexcept;

/// From now on operator new of this thread finds no memory, or finds it again.
void exhaust_memory(bool exhausted) noexcept;

}  // namespace crt_test
