// Whether float32 values are all finite, fast enough to ask after every step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace crt {

inline bool all_finite(const float* values, std::size_t count) noexcept {
  // Infinities and NaN are those with every exponent bit set; the largest bit pattern tells about a block at a time,
  // in a loop of constant length that compilers turn into vector instructions.
  constexpr std::size_t kBlock = 32;
  constexpr std::uint32_t kMagnitude = 0x7fffffffU;
  constexpr std::uint32_t kInfinity = 0x7f800000U;
  std::uint32_t largest = 0;
  std::uint32_t bits[kBlock];
  std::size_t begin = 0;
  for (; begin + kBlock <= count; begin += kBlock) {
    std::memcpy(bits, values + begin, sizeof bits);
    for (const std::uint32_t value : bits) {
      largest = std::max(largest, value & kMagnitude);
    }
  }
  for (; begin < count; ++begin) {
    std::memcpy(bits, values + begin, sizeof bits[0]);
    largest = std::max(largest, bits[0] & kMagnitude);
  }
  return largest < kInfinity;
}

}  // namespace crt
