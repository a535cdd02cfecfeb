// Tensors in host memory.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "engine/engine.hpp"

namespace crt {

/// Zeroed host memory that a CPU runtime reads and writes directly.
class HostBuffer final : public Buffer {
 public:
  /// Throws std::bad_alloc if there is not enough memory.
  HostBuffer(Shape shape, DType dtype);

  void* address() noexcept override { return values_; }
  const void* read() override { return values_; }
  void write(const void* values) override;
  void copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) override;
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end) override;

 private:
  struct Release {
    void operator()(void* memory) const noexcept { std::free(memory); }
  };
  std::unique_ptr<void, Release> memory_;
  unsigned char* values_;
};

}  // namespace crt
