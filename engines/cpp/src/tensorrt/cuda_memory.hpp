// Owners of what a Device hands out, and the buffers of a session on a GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/engine.hpp"
#include "tensorrt/cuda_device.hpp"

namespace crt {

/// Owns memory of the GPU.
class DeviceMemory {
 public:
  DeviceMemory(std::shared_ptr<Device> device, std::size_t bytes);
  ~DeviceMemory();
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;
  void* get() const noexcept { return memory_; }

 private:
  std::shared_ptr<Device> device_;
  void* memory_;
};

/// Owns pinned host memory.
class PinnedMemory {
 public:
  PinnedMemory(std::shared_ptr<Device> device, std::size_t bytes);
  ~PinnedMemory();
  PinnedMemory(const PinnedMemory&) = delete;
  PinnedMemory& operator=(const PinnedMemory&) = delete;
  void* get() const noexcept { return memory_; }

 private:
  std::shared_ptr<Device> device_;
  void* memory_;
};

/// Owns a stream.
class OwnedStream {
 public:
  explicit OwnedStream(std::shared_ptr<Device> device);
  ~OwnedStream();
  OwnedStream(const OwnedStream&) = delete;
  OwnedStream& operator=(const OwnedStream&) = delete;
  Stream get() const noexcept { return stream_; }

 private:
  std::shared_ptr<Device> device_;
  Stream stream_;
};

/// Owns an instantiated CUDA graph; empty at first.
class OwnedGraph {
 public:
  explicit OwnedGraph(std::shared_ptr<Device> device);
  ~OwnedGraph();
  OwnedGraph(const OwnedGraph&) = delete;
  OwnedGraph& operator=(const OwnedGraph&) = delete;
  GraphExec get() const noexcept { return graph_; }
  void reset(GraphExec graph = nullptr) noexcept;

 private:
  std::shared_ptr<Device> device_;
  GraphExec graph_ = nullptr;
};

/// Streams for short copies, handed from thread to thread, so that neither a buffer nor a session needs its own.
class StreamPool {
 public:
  explicit StreamPool(std::shared_ptr<Device> device);

  /// A stream of the pool, given back at the end of the scope.
  class Lease {
   public:
    explicit Lease(StreamPool& pool);
    ~Lease();
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
