// Floating-point values bit by bit: whether they are finite, and halves.
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
    for (const std::uint32_t value : bits) largest = std::max(largest, value & kMagnitude);
  }
  for (; begin < count; ++begin) {
    std::memcpy(bits, values + begin, sizeof bits[0]);
    largest = std::max(largest, bits[0] & kMagnitude);
  }
  return largest < kInfinity;
}

/// The value of a half, exactly.
double double_from_float16(std::uint16_t bits) noexcept;
inline bool is_finite_float16(std::uint16_t bits) noexcept { return (bits & 0x7c00) != 0x7c00; }
/// Rounded once, to the nearest half, halves to even; infinite where the value is beyond the largest one.
std::uint16_t float16_from_double(double value) noexcept;

}  // namespace crt
