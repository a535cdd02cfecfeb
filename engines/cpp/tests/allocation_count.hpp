// How often a thread has asked for memory: operator new is replaced in the program of the tests.
#pragma once

#include <cstddef>

namespace crt_test {

/// Calls of operator new by this thread so far, those inside shared libraries included.
std::size_t allocations() noexcept;

}  // namespace crt_test
