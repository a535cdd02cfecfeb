#include "session/slide.hpp"

#include <cmath>
#include <cstring>

#include "session/floats.hpp"

namespace crt {
namespace {

double value_from(float element) noexcept { return static_cast<double>(element); }
double value_from(std::uint16_t element) noexcept { return double_from_float16(element); }
void round_to(double value, float& element) noexcept { element = static_cast<float>(value); }
void round_to(double value, std::uint16_t& element) noexcept { element = float16_from_double(value); }

}  // namespace

void Window::slide(Buffer& cache, const std::vector<std::int64_t>& positions, const Rotary* rotary) {
  const auto heads = static_cast<std::size_t>(cache.shape()[1]);
  const auto capacity = static_cast<std::size_t>(cache.shape()[2]);
  const std::size_t token_bytes = static_cast<std::size_t>(cache.shape()[3]) * size_of(cache.dtype());
  const auto* content = static_cast<const unsigned char*>(cache.read());
  values_.assign(content, content + cache.bytes());
  for (std::size_t row = 0; row < positions.size(); ++row) {
    if (positions[row] < 0) continue;
    const std::int64_t keep = kept(positions[row]);
    const std::int64_t shift = positions[row] - keep;
    const std::size_t kept_bytes = static_cast<std::size_t>(keep) * token_bytes;
    if (rotary != nullptr) set_angles(*rotary, shift);
    for (std::size_t head = 0; head < heads; ++head) {
      unsigned char* first = values_.data() + (row * heads + head) * capacity * token_bytes;
      std::memmove(first, first + static_cast<std::size_t>(shift) * token_bytes, kept_bytes);
      std::memset(first + kept_bytes, 0, capacity * token_bytes - kept_bytes);
      for (unsigned char* token = first; rotary != nullptr && token < first + kept_bytes; token += token_bytes) {
        if (cache.dtype() == DType::float16) {
          turn_back<std::uint16_t>(token, rotary->interleaved);
        } else {
          turn_back<float>(token, rotary->interleaved);
        }
      }
    }
  }
  cache.write(values_.data());
}

/// The angles of the rotary tables, in float64.
void Window::set_angles(const Rotary& rotary, std::int64_t shift) {
  cos_.clear();
  sin_.clear();
  for (const double frequency : rotary.frequencies) {
    cos_.push_back(std::cos(static_cast<double>(shift) * frequency));
    sin_.push_back(std::sin(static_cast<double>(shift) * frequency));
  }
}

template <typename Element>
void Window::turn_back(unsigned char* token, bool interleaved) const {
  const std::size_t half = cos_.size();
  for (std::size_t pair = 0; pair < half; ++pair) {
    unsigned char* first = token + (interleaved ? 2 * pair : pair) * sizeof(Element);
    unsigned char* second = token + (interleaved ? 2 * pair + 1 : pair + half) * sizeof(Element);
    Element elements[2];
    std::memcpy(&elements[0], first, sizeof(Element));
    std::memcpy(&elements[1], second, sizeof(Element));
    const double a = value_from(elements[0]);
    const double b = value_from(elements[1]);
    round_to(a * cos_[pair] + b * sin_[pair], elements[0]);
    round_to(b * cos_[pair] - a * sin_[pair], elements[1]);
    std::memcpy(first, &elements[0], sizeof(Element));
    std::memcpy(second, &elements[1], sizeof(Element));
  }
}

}  // namespace crt
