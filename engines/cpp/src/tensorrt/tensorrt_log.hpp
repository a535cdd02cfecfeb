// What TensorRT complained about, kept without allocating: its logger is called from threads and places where nothing
// may be thrown.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <string>

namespace crt {

/// Safe to use from several threads; the texts of two failures at the same time may be taken for one another's.
class RuntimeLog {
 public:
  /// Remember a text; once there is no more room, the first ones stay: what came first is the cause.
  void keep(const char* text) noexcept {
    if (text == nullptr) return;
    lock();
    if (length_ > 0) add("; ", 2);
    add(text, std::strlen(text));
    unlock();
  }

  /// The texts as one; forgets them.
  std::string take() {
    std::array<char, kMost> copy;
    lock();
    const std::size_t length = length_;
    std::memcpy(copy.data(), text_.data(), length);
    length_ = 0;
    unlock();
    return std::string(copy.data(), length);  // allocates, so outside the lock
  }

 private:
  static constexpr std::size_t kMost = 2048;

  void add(const char* text, std::size_t length) noexcept {
    const std::size_t taken = std::min(length, text_.size() - length_);
    std::memcpy(text_.data() + length_, text, taken);
    length_ += taken;
  }

  void lock() noexcept {
    while (busy_.test_and_set(std::memory_order_acquire)) {
    }
  }
  void unlock() noexcept { busy_.clear(std::memory_order_release); }

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::array<char, kMost> text_{};
  std::size_t length_ = 0;
};

}  // namespace crt
