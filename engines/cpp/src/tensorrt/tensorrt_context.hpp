// An execution context of the real TensorRT.
#pragma once

#include <memory>
#include <string>

#include "tensorrt/tensorrt_engine.hpp"
#include "tensorrt/tensorrt_handles.hpp"

namespace crt {

class TensorRtContext final : public ExecutionContext {
 public:
  /// captured: see LoadedEngine::create_context(). Throws Error(contract) if TensorRT makes none.
  TensorRtContext(std::shared_ptr<EngineHandle> engine, bool captured);

  void set_input_shape(const std::string& name, const Shape& shape) override;
  void set_address(const std::string& name, void* address) override;
  void enqueue(Stream stream) override;
  bool capturable(Stream stream) override;

 private:
  std::shared_ptr<EngineHandle> engine_;
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
#endif
  std::unique_ptr<nvinfer1::IExecutionContext> context_;  // the first to go
};

}  // namespace crt
