// Launches of a TensorRT engine: a captured CUDA graph for what runs often, a plain enqueue for the rest.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "engine/engine.hpp"
#include "tensorrt/cuda_memory.hpp"
#include "tensorrt/tensorrt_engine.hpp"
#include "tensorrt/tensorrt_plan.hpp"

namespace crt {

/// A context with the stream that its runs are enqueued on.
struct StreamContext {
  std::unique_ptr<OwnedStream> stream;
  std::unique_ptr<ExecutionContext> context;  // destroyed before the stream
  bool used = false;
};

/// Contexts of one engine, lent to one launch at a time: a context may serve one thread at a time and one captured
/// graph, and it holds scratch memory.
class StreamContexts {
 public:
  /// captured: the contexts are for launches that become CUDA graphs.
  StreamContexts(std::shared_ptr<Device> device, std::shared_ptr<LoadedEngine> engine, bool captured);
  /// A context that nobody else uses until it is given back.
  StreamContext borrow();
  void give_back(StreamContext borrowed) noexcept;
  const std::shared_ptr<Device>& device() const noexcept { return device_; }
  LoadedEngine& engine() const noexcept { return *engine_; }

 private:
  std::shared_ptr<Device> device_;
  std::shared_ptr<LoadedEngine> engine_;
  bool captured_;
  std::mutex mutex_;
  std::size_t made_ = 0;
  std::vector<StreamContext> free_;
};

/// Enqueues the engine on every call, in a context borrowed for the call: for prefills, whose shapes change.
class PlainLaunch final : public Launch {
 public:
  PlainLaunch(std::shared_ptr<StreamContexts> contexts, const Binding& inputs, const Binding& outputs);
  void run() override;

 private:
  std::shared_ptr<StreamContexts> contexts_;
  BindingPlan plan_;
};

/// Launches a CUDA graph: for steps. The graph holds its context's addresses and scratch memory, so it keeps that.
class CapturedLaunch final : public Launch {
 public:
  /// Warms up, puts back what that overwrote, and captures.
  CapturedLaunch(std::shared_ptr<StreamContexts> contexts, const Binding& inputs, const Binding& outputs);
  ~CapturedLaunch() override;
  CapturedLaunch(const CapturedLaunch&) = delete;
  CapturedLaunch& operator=(const CapturedLaunch&) = delete;
  /// Captures again after a buffer has moved or a launch has failed.
  void run() override;

 private:
  void prepare();
  void warm_up();
  void capture();

  std::shared_ptr<StreamContexts> contexts_;
  Device& device_;
  BindingPlan plan_;
  StreamContext context_;
  OwnedGraph graph_;
};

/// A graph that TensorRT has loaded.
class TensorRtProgram final : public Program {
 public:
  TensorRtProgram(const std::shared_ptr<Device>& device, const std::shared_ptr<LoadedEngine>& engine);
  const std::vector<TensorSpec>& inputs() const noexcept override { return inputs_; }
  const std::vector<TensorSpec>& outputs() const noexcept override { return outputs_; }
  std::unique_ptr<Launch> bind(const Binding& inputs, const Binding& outputs, bool repeated) override;

 private:
  std::vector<TensorSpec> inputs_;
  std::vector<TensorSpec> outputs_;
  std::shared_ptr<StreamContexts> plain_contexts_;
  std::shared_ptr<StreamContexts> captured_contexts_;
};

}  // namespace crt
