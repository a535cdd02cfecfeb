// IEEE 754 half precision without processor extensions.
#pragma once

#include <cstdint>

namespace crt {

/// The value of a half, exactly.
double double_from_float16(std::uint16_t bits) noexcept;
inline bool is_finite_float16(std::uint16_t bits) noexcept { return (bits & 0x7c00) != 0x7c00; }
/// Rounded once, to the nearest half, halves to even; infinite where the value is beyond the largest one.
std::uint16_t float16_from_double(double value) noexcept;

}  // namespace crt
