// The bundles that tests run on: validate/cpp makes them and names their folders in environment variables.
#pragma once

#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "crt_runtime/bundle.hpp"
#include "crt_runtime/error.hpp"

/// Declares `bundle`, or ends the test with a message where the variable is not set.
#define CRT_OPEN_BUNDLE(bundle, variable)                                          \
  if (std::getenv(variable) == nullptr) {                                          \
    MESSAGE("left out: " variable " names no bundle (validate/cpp makes one)");     \
    return;                                                                        \
  }                                                                                \
  crt::Bundle bundle = crt::Bundle::load(std::getenv(variable), true)

namespace crt_test {

/// Text of the Error of this kind that the call throws; "" if it throws none, fails the test for another kind.
inline std::string error_text(crt::ErrorKind kind, const std::function<void()>& call) {
  try {
    call();
  } catch (const crt::Error& error) {
    CHECK(error.kind() == kind);
    return error.what();
  }
  return "";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

/// Token ids above the special ones, the same for the same seed.
inline std::vector<std::int64_t> some_tokens(std::size_t count, std::uint64_t seed = 0) {
  std::vector<std::int64_t> tokens;
  std::uint64_t state = seed * 2 + 1;
  for (std::size_t index = 0; index < count; ++index) {
    state = state * 6364136223846793005U + 1442695040888963407U;
    tokens.push_back(static_cast<std::int64_t>(32 + (state >> 40U) % 200));
  }
  return tokens;
}

/// A copy of one row of logits.
inline std::vector<float> row_of(const float* logits, std::int64_t row, std::int64_t vocab) {
  return {logits + row * vocab, logits + (row + 1) * vocab};
}

inline double distance(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = a.size() == b.size() ? 0.0 : 1e9;
  for (std::size_t index = 0; index < a.size() && index < b.size(); ++index) {
    const double difference = static_cast<double>(a[index]) - static_cast<double>(b[index]);
    largest = difference < 0 ? (-difference > largest ? -difference : largest)
                             : (difference > largest || difference != difference ? difference : largest);
  }
  return largest;
}

}  // namespace crt_test
