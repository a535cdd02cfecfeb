#include "tensorrt/tensorrt_context.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>

#include "text/messages.hpp"

namespace crt {

namespace {

#ifdef TRT_MAJOR_RTX
std::unique_ptr<nvinfer1::IRuntimeConfig> context_config(EngineHandle& handle, bool captured) {
  using Specialization = nvinfer1::DynamicShapesKernelSpecializationStrategy;
  std::unique_ptr<nvinfer1::IRuntimeConfig> config(handle.engine->createRuntimeConfig());
  if (config == nullptr) refuse(handle.label + ": " + kProduct + " makes no runtime configuration");
  if (handle.cache != nullptr) {
    static_cast<void>(config->setRuntimeCache(*handle.cache));  // without it kernels are compiled again, no more
  }
  // Left to itself TensorRT-RTX runs general kernels while it compiles those of a shape, and a captured graph would
  // hold on to the general ones. Chunks of a prefill have many lengths: waiting for each costs more than it saves.
  config->setDynamicShapesKernelSpecializationStrategy(captured ? Specialization::kEAGER : Specialization::kLAZY);
  // Graphs are captured by the launches, never by TensorRT-RTX.
  static_cast<void>(config->setCudaGraphStrategy(nvinfer1::CudaGraphStrategy::kDISABLED));
  return config;
}
#endif

}  // namespace

TensorRtContext::TensorRtContext(std::shared_ptr<EngineHandle> engine, bool captured) : engine_(std::move(engine)) {
#ifdef TRT_MAJOR_RTX
  config_ = context_config(*engine_, captured);
  context_.reset(engine_->engine->createExecutionContext(config_.get()));
#else
  static_cast<void>(captured);
  context_.reset(engine_->engine->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kSTATIC));
#endif
  if (context_ == nullptr) {
    refuse(engine_->label + ": no execution context, most often for lack of GPU memory: close other sessions, or "
                            "build with a smaller --capacity");
  }
}

void TensorRtContext::set_input_shape(const std::string& name, const Shape& shape) {
  nvinfer1::Dims dims{};
  const std::size_t axes = std::min(shape.size(), static_cast<std::size_t>(nvinfer1::Dims::MAX_DIMS));
  dims.nbDims = static_cast<std::int32_t>(axes);
  std::copy_n(shape.begin(), axes, dims.d);
  if (!context_->setInputShape(name.c_str(), dims)) {
    refuse(engine_->label + ": TensorRT refused shape " + list_text(shape) + " of " + name);
  }
}

void TensorRtContext::set_address(const std::string& name, void* address) {
  if (!context_->setTensorAddress(name.c_str(), address)) {
    refuse(engine_->label + ": TensorRT refused the address of " + name);
  }
}

void TensorRtContext::enqueue(Stream stream) {
  if (!context_->enqueueV3(static_cast<cudaStream_t>(stream))) {
    refuse(engine_->label + ": TensorRT did not run the engine");
  }
}

bool TensorRtContext::capturable(Stream stream) {
#ifdef TRT_MAJOR_RTX
  return context_->isStreamCapturable(static_cast<cudaStream_t>(stream));
#else
  static_cast<void>(stream);
  return context_ != nullptr;
#endif
}

}  // namespace crt
