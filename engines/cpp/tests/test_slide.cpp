// Sliding a cache: keys are turned back by what they move, values only move.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "engine/engine.hpp"
#include "session/floats.hpp"
#include "session/slide.hpp"

namespace {

constexpr std::int64_t kHeadDim = 4;
constexpr std::int64_t kPadded = 6;

crt::Rotary rotary_of(bool interleaved) { return {interleaved, {1.0, std::pow(100.0, -2.0 / kHeadDim)}}; }

/// The key (a, b) = (1 + pair, 2) of every pair, rotated for a position.
std::vector<double> rotated(std::int64_t position, bool interleaved) {
  std::vector<double> key(kPadded, 0.0);
  for (std::size_t pair = 0; pair < 2; ++pair) {
    const double angle = static_cast<double>(position) * std::pow(100.0, -2.0 * static_cast<double>(pair) / kHeadDim);
    const double a = 1.0 + static_cast<double>(pair);
    const double b = 2.0;
    key[interleaved ? 2 * pair : pair] = a * std::cos(angle) - b * std::sin(angle);
    key[interleaved ? 2 * pair + 1 : pair + 2] = a * std::sin(angle) + b * std::cos(angle);
  }
  return key;
}

}  // namespace

TEST_CASE("slide: the latest keys become those of the positions in front, in both layouts and dtypes") {
  for (const bool interleaved : {true, false}) {
    for (const crt::DType dtype : {crt::DType::float32, crt::DType::float16}) {
      crt::HostBuffer cache({2, 1, 8, kPadded}, dtype);
      std::vector<float> floats(2 * 8 * kPadded, 0.0F);
      std::vector<std::uint16_t> halves(floats.size(), 0);
      for (std::int64_t position = 0; position < 7; ++position) {
        const std::vector<double> key = rotated(position, interleaved);
        for (std::size_t channel = 0; channel < key.size(); ++channel) {
          const std::size_t at = static_cast<std::size_t>(position * kPadded) + channel;
          floats[at] = static_cast<float>(key[channel]);
          halves[at] = crt::float16_from_double(key[channel]);
        }
      }
      const bool half = dtype == crt::DType::float16;
      cache.write(half ? static_cast<const void*>(halves.data()) : floats.data());
      const crt::Rotary rotary = rotary_of(interleaved);
      crt::Window(4).slide(cache, {7, -1}, &rotary);
      for (std::int64_t position = 0; position < 8; ++position) {
        const std::vector<double> wanted =
            position < 3 ? rotated(position, interleaved) : std::vector<double>(kPadded, 0.0);
        for (std::size_t channel = 0; channel < wanted.size(); ++channel) {
          const std::size_t at = static_cast<std::size_t>(position * kPadded) + channel;
          const double found = half ? crt::double_from_float16(static_cast<const std::uint16_t*>(cache.read())[at])
                                    : static_cast<double>(static_cast<const float*>(cache.read())[at]);
          CHECK(std::fabs(found - wanted[channel]) <= (half ? 4e-3 : 1e-6));
        }
      }
    }
  }
}

TEST_CASE("slide: values move as they are") {
  crt::HostBuffer cache({1, 2, 5, kPadded}, crt::DType::float32);
  std::vector<float> values(2 * 5 * kPadded);
  for (std::size_t at = 0; at < values.size(); ++at) {
    values[at] = static_cast<float>(at + 1);
  }
  cache.write(values.data());
  crt::Window(4).slide(cache, {5}, nullptr);
  const auto* found = static_cast<const float*>(cache.read());
  for (std::size_t at = 0; at < values.size(); ++at) {
    const std::size_t in_head = at % (5 * kPadded);
    CHECK(found[at] == (in_head < 3 * kPadded ? values[at + 2 * kPadded] : 0.0F));
  }
}

TEST_CASE("half precision: every half survives the way through double, and rounding goes to the nearest, ties to even") {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const double value = crt::double_from_float16(half);
    if (std::isnan(value)) {
      CHECK_FALSE(crt::is_finite_float16(half));
    } else if (crt::float16_from_double(value) != half) {
      FAIL("half " << bits << " came back as " << crt::float16_from_double(value));
    }
  }
  const double one_step = 1.0 / 1024.0;
  CHECK(crt::float16_from_double(1.0 + 0.5 * one_step) == 0x3c00);
  CHECK(crt::float16_from_double(1.0 + 1.5 * one_step) == 0x3c02);
  CHECK(crt::float16_from_double(1.0 + 0.5000001 * one_step) == 0x3c01);
  CHECK(crt::float16_from_double(2.0 - 0.25 * one_step) == 0x4000);
  CHECK(crt::float16_from_double(65519.99) == 0x7bff);
  CHECK(crt::float16_from_double(-65520.0) == 0xfc00);
  CHECK(crt::float16_from_double(std::ldexp(1.0, -25)) == 0x0000);
  CHECK(crt::float16_from_double(std::ldexp(1.5, -25)) == 0x0001);
  CHECK(crt::float16_from_double(-0.0) == 0x8000);
}

TEST_CASE("slide: a float16 cache needs an eighth more than the window, so that a key is rounded eight times at most") {
  CHECK(crt::Window::least_capacity(512, crt::DType::float32) == 512);
  CHECK(crt::Window::least_capacity(512, crt::DType::float16) == 576);
  CHECK(crt::Window::least_capacity(6, crt::DType::float16) == 7);
}
