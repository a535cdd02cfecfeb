// What a full row does in a session that evicts: forget what no attention window sees any longer. The C++ twin of
// crt_export/runtime/slide.py, which says why this is exact up to rounding.
#pragma once

#include <cstdint>
#include <vector>

#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

/// What the caches of a full row keep, all as many tokens, and how their keys are turned.
class Window {
 public:
  /// size: latest tokens that a token sees, itself included, as ModelConfig::window() gives them.
  explicit Window(std::int64_t size) : size_(size) {}

  std::int64_t size() const noexcept { return size_; }
  /// Smallest capacity to slide in: the window, and an eighth more where keys are rounded to float16 at every slide.
  static std::int64_t least_capacity(std::int64_t window, DType cache_dtype) noexcept {
    return cache_dtype == DType::float16 ? window + (window + 7) / 8 : window;
  }
  /// How many of a row's tokens a slide keeps.
  std::int64_t kept(std::int64_t position) const noexcept { return position < size_ - 1 ? position : size_ - 1; }
  /// Slide some rows of a cache [batch, heads, capacity, head_dim]; positions: int64 [batch], tokens in the rows that
  /// slide, -1 for the others. rotary: by which keys are turned back as many positions as they move; null: they only
  /// move, as values do. A cache may hold more channels than it turns, which are padding.
  void slide(Buffer& cache, const std::vector<std::int64_t>& positions, const Rotary* rotary);

 private:
  void set_angles(const Rotary& rotary, std::int64_t shift);
  template <typename Element>
  void turn_back(unsigned char* token, bool interleaved) const;

  std::int64_t size_;
  // Scratch, kept from cache to cache.
  std::vector<double> cos_;
  std::vector<double> sin_;
  std::vector<unsigned char> values_;
};

}  // namespace crt
