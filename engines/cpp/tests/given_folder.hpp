// The folder of the bundle that tests with a model run on; validate/cpp makes one and names it in CRT_TEST_BUNDLE.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>

namespace crt_test {

/// nullptr, with a message, where there is none and the test has nothing to run on.
inline const char* given_folder() {
  const char* folder = std::getenv("CRT_TEST_BUNDLE");
  if (folder == nullptr) MESSAGE("left out: CRT_TEST_BUNDLE names no bundle (validate/cpp makes one)");
  return folder;
}

}  // namespace crt_test
