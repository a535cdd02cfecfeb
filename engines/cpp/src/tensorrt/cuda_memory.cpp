#include "tensorrt/cuda_memory.hpp"

#include <cstring>
#include <utility>

#include "crt_runtime/error.hpp"

namespace crt {

std::unique_ptr<OwnedStream> StreamPool::take() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      std::unique_ptr<OwnedStream> stream = std::move(free_.back());
      free_.pop_back();
      return stream;
    }
    free_.reserve(++made_);  // so that giving back never allocates
  }
  return std::make_unique<OwnedStream>(device_);
}

void StreamPool::give_back(std::unique_ptr<OwnedStream> stream) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(stream));
}

DeviceBuffer::DeviceBuffer(std::shared_ptr<StreamPool> streams, Shape shape, DType dtype)
    : Buffer(std::move(shape), dtype), streams_(std::move(streams)), memory_(streams_->device(), bytes()) {
  const StreamPool::Lease stream(*streams_);
  streams_->device()->fill_zero(memory_.get(), bytes(), bytes(), 1, stream.get());
  streams_->device()->synchronize(stream.get());
}

void* DeviceBuffer::host_memory() {
  if (bytes() > kMostPinnedBytes) {
    pageable_.resize(bytes());
    return pageable_.data();
  }
  if (pinned_ == nullptr) pinned_ = std::make_unique<PinnedMemory>(streams_->device(), bytes());
  return pinned_->get();
}

const void* DeviceBuffer::read() {
  void* host = host_memory();
  const StreamPool::Lease stream(*streams_);
  streams_->device()->copy_to_host(host, memory_.get(), bytes(), stream.get());
  streams_->device()->synchronize(stream.get());
  return host;
}

void DeviceBuffer::write(const void* values) {
  void* host = host_memory();
  std::memmove(host, values, bytes());  // the values may be what read() gave out
  const StreamPool::Lease stream(*streams_);
  streams_->device()->copy_to_device(memory_.get(), host, bytes(), stream.get());
  streams_->device()->synchronize(stream.get());
}

void DeviceBuffer::copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) {
  if (source.shape() != shape() || source.dtype() != dtype()) {
    throw Error(ErrorKind::contract, "rows can only be copied between buffers of the same shape and dtype");
  }
  const std::size_t offset = row_bytes() * static_cast<std::size_t>(begin);
  const std::size_t length = row_bytes() * static_cast<std::size_t>(end - begin);
  if (length == 0) return;
  const StreamPool::Lease stream(*streams_);
  streams_->device()->copy(static_cast<unsigned char*>(address()) + offset,
                           static_cast<unsigned char*>(source.address()) + offset, length, stream.get());
  streams_->device()->synchronize(stream.get());
}

void DeviceBuffer::clear(std::int64_t row, std::int64_t begin, std::int64_t end) {
  if (begin >= end) return;
  const std::size_t token = static_cast<std::size_t>(shape().at(3)) * size_of(dtype());
  const std::size_t head = static_cast<std::size_t>(shape().at(2)) * token;
  unsigned char* first = static_cast<unsigned char*>(address()) + row_bytes() * static_cast<std::size_t>(row) +
                         token * static_cast<std::size_t>(begin);
  const StreamPool::Lease stream(*streams_);
  streams_->device()->fill_zero(first, head, token * static_cast<std::size_t>(end - begin),
                                static_cast<std::size_t>(shape().at(1)), stream.get());
  streams_->device()->synchronize(stream.get());
}

}  // namespace crt
