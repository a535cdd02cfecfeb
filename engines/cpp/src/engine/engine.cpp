#include "engine/engine.hpp"

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
    case DType::int64:
      return 8;
    case DType::float32:
      return 4;
    case DType::float16:
      return 2;
  }
  return 0;
}

const char* name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::int64:
      return "int64";
    case DType::float32:
      return "float32";
    case DType::float16:
      return "float16";
  }
  return "unknown";
}

Buffer::Buffer(Shape shape, DType dtype)
    : shape_(std::move(shape)), dtype_(dtype), bytes_(element_count(shape_) * size_of(dtype)) {}

Shape Rows::shape() const {
  Shape shape = buffer->shape();
  shape[0] = stop - start;
  return shape;
}

void* Rows::address() const {
  return static_cast<unsigned char*>(buffer->address()) + buffer->row_bytes() * static_cast<std::size_t>(start);
}

}  // namespace crt
