#include "tensorrt/tensorrt_launch.hpp"

#include <utility>

#include "crt_runtime/error.hpp"

namespace crt {
namespace {

void enqueue(Device& device, const BindingPlan& plan, const StreamContext& borrowed) {
  const Stream stream = borrowed.stream->get();
  plan.stage_inputs(device, stream);
  borrowed.context->enqueue(stream);
  plan.unstage_outputs(device, stream);
}

}  // namespace

StreamContexts::StreamContexts(std::shared_ptr<Device> device, std::shared_ptr<LoadedEngine> engine, bool captured)
    : device_(std::move(device)), engine_(std::move(engine)), captured_(captured) {}

StreamContext StreamContexts::borrow() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      StreamContext borrowed = std::move(free_.back());
      free_.pop_back();
      return borrowed;
    }
    free_.reserve(++made_);  // so that giving back never allocates
  }
  device_->make_current();
  StreamContext borrowed;
  borrowed.stream = std::make_unique<OwnedStream>(device_);
  borrowed.context = engine_->create_context(captured_);
  return borrowed;
}

void StreamContexts::give_back(StreamContext borrowed) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(borrowed));
}

PlainLaunch::PlainLaunch(std::shared_ptr<StreamContexts> contexts, const Binding& inputs, const Binding& outputs)
    : contexts_(std::move(contexts)), plan_(contexts_->engine(), inputs, outputs) {
  plan_.place(contexts_->device());
}

void PlainLaunch::run() {
  Device& device = *contexts_->device();
  device.make_current();
  if (plan_.moved()) plan_.place(contexts_->device());
  StreamContext borrowed = contexts_->borrow();
  plan_.apply(*borrowed.context);
  enqueue(device, plan_, borrowed);
  device.synchronize(borrowed.stream->get());
  const bool first = !std::exchange(borrowed.used, true);
  contexts_->give_back(std::move(borrowed));  // not after a failure: what its context holds is then unknown
  if (first) contexts_->engine().warmed_up();
}

CapturedLaunch::CapturedLaunch(std::shared_ptr<StreamContexts> contexts, const Binding& inputs, const Binding& outputs)
    : contexts_(std::move(contexts)),
      device_(*contexts_->device()),
      plan_(contexts_->engine(), inputs, outputs),
      context_(contexts_->borrow()),
      graph_(contexts_->device()) {
  device_.make_current();
  prepare();  // throws: the context goes too, because what its context holds is then unknown
}

CapturedLaunch::~CapturedLaunch() {
  const bool valid = graph_.get() != nullptr;
  graph_.reset();
  if (valid) contexts_->give_back(std::move(context_));
}

void CapturedLaunch::run() {
  device_.make_current();
  if (graph_.get() == nullptr || plan_.moved()) prepare();
  try {
    device_.launch_graph(graph_.get(), context_.stream->get());
    device_.synchronize(context_.stream->get());
  } catch (...) {
    graph_.reset();
    throw;
  }
}

void CapturedLaunch::prepare() {
  graph_.reset();  // it would run with addresses that are no longer the session's
  plan_.place(contexts_->device());
  plan_.apply(*context_.context);
  warm_up();
  if (!context_.context->capturable(context_.stream->get())) {
    throw Error(ErrorKind::contract, contexts_->engine().label() +
                                         ": TensorRT says that this engine cannot be captured into a CUDA graph");
  }
  capture();
}

// TensorRT prepares lazily in the first run after a change, and none of that may be captured. The run is a real one: it
// writes the caches in place and every output, so all of it is put back.
void CapturedLaunch::warm_up() {
  const Stream stream = context_.stream->get();
  std::vector<std::pair<const PlannedTensor*, std::unique_ptr<DeviceMemory>>> saved;
  for (const PlannedTensor& tensor : plan_.tensors()) {
    if (!tensor.is_input && tensor.bound == tensor.home) {  // what is staged is only written by unstage_outputs()
      saved.emplace_back(&tensor, std::make_unique<DeviceMemory>(contexts_->device(), tensor.bytes));
      device_.copy(saved.back().second->get(), tensor.home, tensor.bytes, stream);
    }
  }
  const auto put_back = [&] {
    for (const auto& [tensor, memory] : saved) device_.copy(tensor->home, memory->get(), tensor->bytes, stream);
    device_.synchronize(stream);
  };
  try {
    plan_.stage_inputs(device_, stream);
    context_.context->enqueue(stream);
    device_.synchronize(stream);
  } catch (...) {
    try {
      put_back();
    } catch (const Error&) {  // the GPU is gone: the first failure is the one to report
    }
    throw;
  }
  put_back();
  if (!std::exchange(context_.used, true)) contexts_->engine().warmed_up();
}

void CapturedLaunch::capture() {
  device_.begin_capture(context_.stream->get());
  try {
    enqueue(device_, plan_, context_);
  } catch (...) {
    device_.abandon_capture(context_.stream->get());
    throw;
  }
  graph_.reset(device_.end_capture(context_.stream->get()));
}

TensorRtProgram::TensorRtProgram(const std::shared_ptr<Device>& device, const std::shared_ptr<LoadedEngine>& engine)
    : plain_contexts_(std::make_shared<StreamContexts>(device, engine, false)),
      captured_contexts_(std::make_shared<StreamContexts>(device, engine, true)) {
  for (const EngineTensor& tensor : engine->tensors()) (tensor.is_input ? inputs_ : outputs_).push_back(tensor.spec);
}

std::unique_ptr<Launch> TensorRtProgram::bind(const Binding& inputs, const Binding& outputs, bool repeated) {
  if (repeated) return std::make_unique<CapturedLaunch>(captured_contexts_, inputs, outputs);
  return std::make_unique<PlainLaunch>(plain_contexts_, inputs, outputs);
}

}  // namespace crt
