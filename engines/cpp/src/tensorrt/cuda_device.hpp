// The few things the TensorRT back ends need of CUDA, behind an interface: a test drives the whole logic with a device
// in host memory, and only cuda_gpu.cpp stays untested without a GPU. The twin of
// crt_export/engine/tensorrt/device.py.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace crt {

/// A CUDA stream (cudaStream_t), opaque so that no CUDA header is needed.
using Stream = void*;
/// An instantiated CUDA graph (cudaGraphExec_t).
using GraphExec = void*;

/// One GPU. Every function that can fail throws Error(contract) or, where the GPU or its driver is absent,
/// Error(missing_dependency), naming the CUDA error. Safe to use from several threads.
class Device {
 public:
  virtual ~Device() = default;

  /// Make this GPU the calling thread's, as every CUDA call expects; the other functions do so themselves.
  virtual void make_current() = 0;

  /// Memory of the GPU, aligned to at least 256 bytes.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void free(void* memory) noexcept = 0;
  /// Pinned host memory: only copies from and to it are asynchronous.
  virtual void* allocate_host(std::size_t bytes) = 0;
  virtual void free_host(void* memory) noexcept = 0;

  /// A stream that does not wait for the default stream.
  virtual Stream create_stream() = 0;
  virtual void free_stream(Stream stream) noexcept = 0;
  /// Wait for everything on the stream; reports what failed there.
  virtual void synchronize(Stream stream) = 0;

  virtual void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) = 0;
  virtual void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) = 0;
  virtual void copy(void* to, const void* from, std::size_t bytes, Stream stream) = 0;
  /// Zero `width` bytes at the start of each of `height` lines that lie `pitch` bytes apart.
  virtual void fill_zero(void* memory, std::size_t pitch, std::size_t width, std::size_t height, Stream stream) = 0;

  /// From here to end_capture() the calling thread's work on the stream is recorded instead of run.
  virtual void begin_capture(Stream stream) = 0;
  /// The recorded work, ready to be launched any number of times with the addresses it was recorded with.
  virtual GraphExec end_capture(Stream stream) = 0;
  /// Leave a capture that failed half-way.
  virtual void abandon_capture(Stream stream) noexcept = 0;
  virtual void launch_graph(GraphExec graph, Stream stream) = 0;
  virtual void free_graph(GraphExec graph) noexcept = 0;
};

/// The GPU that an engine runs on.
struct Gpu {
  std::shared_ptr<Device> device;
  std::string name;
  int compute_capability = 0;  // 80 is SM 8.0
};

/// The calling thread's current GPU: GPU 0, unless the application chose another with cudaSetDevice. Throws
/// Error(missing_dependency) if there is none or its driver is absent or too old.
Gpu open_gpu();

}  // namespace crt
