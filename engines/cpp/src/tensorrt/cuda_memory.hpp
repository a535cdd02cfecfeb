// Owners of what a Device hands out, and the buffers of a session on a GPU.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "engine/engine.hpp"
#include "tensorrt/cuda_device.hpp"

namespace crt {

/// Owns something that a Device hands out and takes back.
template <typename Handle, void (Device::*release)(Handle) noexcept>
class Owned {
 public:
  Owned(std::shared_ptr<Device> device, Handle handle) : device_(std::move(device)), handle_(handle) {}
  ~Owned() { ((*device_).*release)(handle_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  Handle get() const noexcept { return handle_; }

 private:
  std::shared_ptr<Device> device_;
  Handle handle_;
};

/// Memory of the GPU.
struct DeviceMemory : Owned<void*, &Device::free> {
  DeviceMemory(const std::shared_ptr<Device>& device, std::size_t bytes)
      : Owned(device, device->allocate(std::max<std::size_t>(bytes, 1))) {}
};

/// Pinned host memory.
struct PinnedMemory : Owned<void*, &Device::free_host> {
  PinnedMemory(const std::shared_ptr<Device>& device, std::size_t bytes)
      : Owned(device, device->allocate_host(std::max<std::size_t>(bytes, 1))) {}
};

struct OwnedStream : Owned<Stream, &Device::free_stream> {
  explicit OwnedStream(const std::shared_ptr<Device>& device) : Owned(device, device->create_stream()) {}
};

/// Owns an instantiated CUDA graph; empty at first.
class OwnedGraph {
 public:
  explicit OwnedGraph(std::shared_ptr<Device> device) : device_(std::move(device)) {}
  ~OwnedGraph() { reset(); }
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;
  GraphExec get() const noexcept { return graph_; }
  void reset(GraphExec graph = nullptr) noexcept {
    if (graph_ != nullptr) device_->free_graph(graph_);
    graph_ = graph;
  }

 private:
  std::shared_ptr<Device> device_;
  GraphExec graph_ = nullptr;
};

/// Streams for short copies, handed from thread to thread, so that neither a buffer nor a session needs its own.
class StreamPool {
 public:
  explicit StreamPool(std::shared_ptr<Device> device) : device_(std::move(device)) {}

  /// A stream of the pool, given back at the end of the scope.
  class Lease {
   public:
    explicit Lease(StreamPool& pool) : pool_(pool), stream_(pool.take()) {}
    ~Lease() { pool_.give_back(std::move(stream_)); }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Stream get() const noexcept { return stream_->get(); }

   private:
    StreamPool& pool_;
    std::unique_ptr<OwnedStream> stream_;
  };

  const std::shared_ptr<Device>& device() const noexcept { return device_; }

 private:
  std::unique_ptr<OwnedStream> take();
  void give_back(std::unique_ptr<OwnedStream> stream) noexcept;

  std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::vector<std::unique_ptr<OwnedStream>> free_;
  std::size_t made_ = 0;
};

/// Larger tensors (caches, which cross over only for snapshots) go through ordinary memory: pinned memory is scarce.
constexpr std::size_t kMostPinnedBytes = std::size_t{16} << 20;

/// A tensor in the GPU's memory. Every function has finished its work on the GPU when it returns.
class DeviceBuffer final : public Buffer {
 public:
  /// Zeroed.
  DeviceBuffer(std::shared_ptr<StreamPool> streams, Shape shape, DType dtype);

  void* address() noexcept override { return memory_.get(); }
  const void* read() override;
  void write(const void* values) override;
  void copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) override;
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end) override;

 private:
  void* host_memory();

  std::shared_ptr<StreamPool> streams_;
  DeviceMemory memory_;
  std::unique_ptr<PinnedMemory> pinned_;  // made by the first read or write
  std::vector<unsigned char> pageable_;   // the same for tensors that are too large
};

}  // namespace crt
