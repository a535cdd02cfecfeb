// An engine that TensorRT has deserialised, behind an interface, so that binding and capturing are tested without
// TensorRT. tensorrt_api.cpp implements it over the real library.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "tensorrt/cuda_device.hpp"

namespace crt {

/// One execution context: its shapes, its addresses and its scratch memory. Not safe to use from two threads at once,
/// and a CUDA graph captured from it stays valid only while its shapes and addresses do.
class ExecutionContext {
 public:
  virtual ~ExecutionContext() = default;
  /// Throws Error(contract) if TensorRT refuses; the binding plan has checked the shape before.
  virtual void set_input_shape(const std::string& name, const Shape& shape) = 0;
  /// The address must be aligned to 256 bytes.
  virtual void set_address(const std::string& name, void* address) = 0;
  /// Put one run on the stream.
  virtual void enqueue(Stream stream) = 0;
  /// Whether a run on this stream can be captured; only TensorRT-RTX can be asked.
  virtual bool capturable(Stream stream) = 0;
};

/// One input or output of a loaded engine, as the engine itself says.
struct EngineTensor {
  TensorSpec spec;  // -1 for a dynamic dim
  bool is_input = false;
  Shape least;        // smallest shape of the profile; empty for outputs
  Shape most;         // largest shape of the profile; empty for outputs
  std::string alias;  // the input whose memory an output shares; empty for none
};

/// One deserialised engine; safe to use from several threads.
class LoadedEngine {
 public:
  virtual ~LoadedEngine() = default;
  /// What to call it in messages.
  virtual const std::string& label() const noexcept = 0;
  virtual const std::vector<EngineTensor>& tensors() const noexcept = 0;
  /// captured: its runs become CUDA graphs, so the kernels of a shape must be there before it goes on.
  virtual std::unique_ptr<ExecutionContext> create_context(bool captured) = 0;
  /// A context has run for the first time: kernels that were compiled for it may be kept for the next process.
  virtual void warmed_up() noexcept = 0;
};

}  // namespace crt
