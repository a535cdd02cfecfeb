// What a full row does in a session that slides: forget what the attention window no longer sees. The C++ twin of
// crt_export/runtime/caches.py, which says why this is exact up to rounding.
#pragma once

#include <cstdint>
#include <vector>

#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"

namespace crt {

/// The attention window of a model, and how its keys are rotated.
class Window {
 public:
  /// config.sliding_window must be set.
  explicit Window(const ModelConfig& config);

  /// Keys that a token sees, itself included.
  std::int64_t size() const noexcept { return size_; }
  /// Smallest capacity to slide in: the window, and an eighth more where keys are rounded to float16 at every slide.
  static std::int64_t least_capacity(std::int64_t window, DType cache_dtype) noexcept {
    return cache_dtype == DType::float16 ? window + (window + 7) / 8 : window;
  }
  /// How many of a row's tokens a slide keeps.
  std::int64_t kept(std::int64_t position) const noexcept { return position < size_ - 1 ? position : size_ - 1; }
  /// Slide some rows of a cache [batch, heads, capacity, head_dim]; positions: int64 [batch], tokens in the rows
  /// that slide, -1 for the others. Keys are turned back by as many positions as they move.
  void slide(Buffer& cache, const std::vector<std::int64_t>& positions, bool keys);

 private:
  void set_angles(std::int64_t shift);
  template <typename Element>
  void turn_back(unsigned char* token) const;

  std::int64_t size_;
  std::size_t half_;
  double theta_;
  bool interleaved_;
  std::vector<double> cos_;
  std::vector<double> sin_;
  std::vector<unsigned char> values_;
};

}  // namespace crt
