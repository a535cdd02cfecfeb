#include "session/floats.hpp"

#include <cmath>

namespace crt {
namespace {

constexpr unsigned kFractionBits = 10;
constexpr std::uint16_t kInfinity = 0x7c00;
constexpr std::uint16_t kNotANumber = 0x7e00;
constexpr std::uint16_t kSign = 0x8000;
constexpr int kSmallestExponent = -14;  // of the normal numbers; the subnormal ones have its spacing

}  // namespace

double double_from_float16(std::uint16_t bits) noexcept {
  const double sign = (bits & kSign) != 0 ? -1.0 : 1.0;
  const int exponent = (bits & kInfinity) >> kFractionBits;
  const int fraction = bits & 0x3ff;
  if (exponent == 0x1f) return fraction != 0 ? std::nan("") : sign * HUGE_VAL;
  if (exponent == 0) return sign * std::ldexp(fraction, kSmallestExponent - 10);
  return sign * std::ldexp(0x400 + fraction, exponent - 25);
}

std::uint16_t float16_from_double(double value) noexcept {
  const std::uint16_t sign = std::signbit(value) ? kSign : std::uint16_t{0};
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | kNotANumber);
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520.0) {  // half way from the largest half to the next power of two
    return static_cast<std::uint16_t>(sign | kInfinity);
  }
  int exponent = magnitude > 0.0 ? std::ilogb(magnitude) : kSmallestExponent;
  exponent = exponent < kSmallestExponent ? kSmallestExponent : exponent;
  // A whole number of the spacing of halves here: 0 to 2048, exact but for the one rounding (half to even).
  const auto steps = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // Counted from the smallest normal number, the encodings are consecutive across powers of two.
  const unsigned base = static_cast<unsigned>(exponent - kSmallestExponent) << kFractionBits;
  return static_cast<std::uint16_t>(sign | (base + steps));
}

}  // namespace crt
