#include "engine/engine.hpp"

#include <cstring>
#include <new>
#include <utility>

#include "crt_runtime/error.hpp"

namespace crt {
namespace {

std::size_t element_count(const Shape& shape) {
  std::size_t count = 1;
  for (const std::int64_t dim : shape) {
    if (dim < 0 || (dim > 0 && count > static_cast<std::size_t>(-1) / 8 / static_cast<std::size_t>(dim))) {
      throw Error(ErrorKind::input, "a tensor of this session would be larger than memory can address: "
                                    "ask for a smaller batch or capacity");
    }
    count *= static_cast<std::size_t>(dim);
  }
  return count;
}

}  // namespace

std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::int64: return 8;
    case DType::float32: return 4;
    case DType::float16: return 2;
  }
  return 0;
}

Shape shape_of_tokens(std::int64_t rows, std::int64_t seq, const Shape& shape) {
  Shape dims{rows, seq};
  dims.insert(dims.end(), shape.begin(), shape.end());
  return dims;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::int64: return "int64";
    case DType::float32: return "float32";
    case DType::float16: return "float16";
  }
  return "unknown";
}

Buffer::Buffer(Shape shape, DType dtype)
    : shape_(std::move(shape)), dtype_(dtype), bytes_(element_count(shape_) * size_of(dtype)) {}

Shape BufferSlice::shape() const {
  Shape shape = buffer->shape();
  shape[0] = stop - start;
  return shape;
}

void* BufferSlice::address() const {
  return static_cast<unsigned char*>(buffer->address()) + buffer->row_bytes() * static_cast<std::size_t>(start);
}

namespace {

constexpr std::size_t kAlignment = 64;  // a cache line, and the widest vector register

}  // namespace

// calloc rather than a vector: the system gives a large cache as zero pages, which cost nothing until they are used.
HostBuffer::HostBuffer(Shape shape, DType dtype)
    : Buffer(std::move(shape), dtype), memory_(std::calloc(bytes() + kAlignment, 1)) {
  if (memory_ == nullptr) throw std::bad_alloc();
  void* start = memory_.get();
  std::size_t space = bytes() + kAlignment;
  values_ = static_cast<unsigned char*>(std::align(kAlignment, bytes(), start, space));
}

void HostBuffer::write(const void* values) {
  if (bytes() > 0) std::memmove(values_, values, bytes());
}

void HostBuffer::copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) {
  const std::size_t offset = row_bytes() * static_cast<std::size_t>(begin);
  const std::size_t count = row_bytes() * static_cast<std::size_t>(end - begin);
  if (count > 0) std::memmove(values_ + offset, static_cast<const unsigned char*>(source.read()) + offset, count);
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
