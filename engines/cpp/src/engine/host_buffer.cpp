#include "engine/host_buffer.hpp"

#include <cstring>
#include <new>
#include <utility>

namespace crt {

namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector register

}  // namespace

// calloc rather than a vector: the system gives a large cache as zero pages, which cost nothing until they are used.
HostBuffer::HostBuffer(Shape shape, DType dtype)
    : Buffer(std::move(shape), dtype), memory_(std::calloc(bytes() + kAlignment, 1)) {
  if (memory_ == nullptr) {
    throw std::bad_alloc();
  }
  void* start = memory_.get();
  std::size_t space = bytes() + kAlignment;
  values_ = static_cast<unsigned char*>(std::align(kAlignment, bytes(), start, space));
}

void HostBuffer::write(const void* values) {
  if (bytes() > 0) {
    std::memmove(values_, values, bytes());
  }
}

void HostBuffer::copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) {
  const std::size_t offset = row_bytes() * static_cast<std::size_t>(begin);
  const std::size_t count = row_bytes() * static_cast<std::size_t>(end - begin);
  if (count > 0) {
    std::memmove(values_ + offset, static_cast<const unsigned char*>(source.read()) + offset, count);
  }
}

void HostBuffer::clear(std::int64_t row, std::int64_t begin, std::int64_t end) {
  const auto heads = static_cast<std::size_t>(shape()[1]);
  const auto capacity = static_cast<std::size_t>(shape()[2]);
  const std::size_t token_bytes = static_cast<std::size_t>(shape()[3]) * size_of(dtype());
  for (std::size_t head = 0; head < heads; ++head) {
    const std::size_t first = (static_cast<std::size_t>(row) * heads + head) * capacity;
    std::memset(values_ + (first + static_cast<std::size_t>(begin)) * token_bytes, 0,
                static_cast<std::size_t>(end - begin) * token_bytes);
  }
}

}  // namespace crt
