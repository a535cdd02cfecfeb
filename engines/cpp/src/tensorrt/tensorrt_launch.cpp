#include "tensorrt/tensorrt_launch.hpp"

#include <utility>

#include "crt_runtime/error.hpp"

namespace crt {

namespace {

void enqueue(Device& device, const BindingPlan& plan, const Lane& lane) {
  const Stream stream = lane.stream->get();
  plan.stage_inputs(device, stream);
  lane.context->enqueue(stream);
  plan.unstage_outputs(device, stream);
}

}  // namespace

Lanes::Lanes(std::shared_ptr<Device> device, std::shared_ptr<LoadedEngine> engine, bool captured)
    : device_(std::move(device)), engine_(std::move(engine)), captured_(captured) {}

Lane Lanes::borrow() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      Lane lane = std::move(free_.back());
      free_.pop_back();
      return lane;
    }
    free_.reserve(++made_);  // so that giving back never allocates
  }
  device_->make_current();
  Lane lane;
  lane.stream = std::make_unique<OwnedStream>(device_);
  lane.context = engine_->create_context(captured_);
  return lane;
}

void Lanes::give_back(Lane lane) noexcept {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(std::move(lane));
}

PlainLaunch::PlainLaunch(std::shared_ptr<Lanes> lanes, const Binding& inputs, const Binding& outputs)
    : lanes_(std::move(lanes)), plan_(lanes_->engine(), inputs, outputs) {
  plan_.place(lanes_->device());
}

void PlainLaunch::run() {
  Device& device = *lanes_->device();
  device.make_current();
  if (plan_.moved()) {
    plan_.place(lanes_->device());
  }
  Lane lane = lanes_->borrow();
  plan_.apply(*lane.context);
  enqueue(device, plan_, lane);
  device.synchronize(lane.stream->get());
  const bool first = !std::exchange(lane.used, true);
  lanes_->give_back(std::move(lane));  // not after a failure: what its context holds is then unknown
  if (first) {
    lanes_->engine().warmed_up();
  }
}

CapturedLaunch::CapturedLaunch(std::shared_ptr<Lanes> lanes, const Binding& inputs, const Binding& outputs)
    : lanes_(std::move(lanes)),
      device_(*lanes_->device()),
      plan_(lanes_->engine(), inputs, outputs),
      lane_(lanes_->borrow()),
      graph_(lanes_->device()) {
  device_.make_current();
  prepare();  // throws: the lane goes too, because what its context holds is then unknown
}

CapturedLaunch::~CapturedLaunch() {
  const bool sound = graph_.get() != nullptr;
  graph_.reset();
  if (sound) {
    lanes_->give_back(std::move(lane_));
  }
}

void CapturedLaunch::run() {
  device_.make_current();
  if (graph_.get() == nullptr || plan_.moved()) {
    prepare();
  }
  try {
    device_.launch_graph(graph_.get(), lane_.stream->get());
    device_.synchronize(lane_.stream->get());
  } catch (...) {
    graph_.reset();
    throw;
  }
}

void CapturedLaunch::prepare() {
  graph_.reset();  // it would run with addresses that are no longer the session's
  plan_.place(lanes_->device());
  plan_.apply(*lane_.context);
  warm_up();
  if (!lane_.context->capturable(lane_.stream->get())) {
    throw Error(ErrorKind::contract, lanes_->engine().label() +
                                         ": TensorRT says that this engine cannot be captured into a CUDA graph");
  }
  capture();
}

// TensorRT prepares lazily in the first run after a change, and none of that may be captured. The run is a real one: it
// writes the caches in place and every output, so all of it is put back.
void CapturedLaunch::warm_up() {
  const Stream stream = lane_.stream->get();
  std::vector<std::pair<const PlannedTensor*, std::unique_ptr<DeviceMemory>>> saved;
  for (const PlannedTensor& tensor : plan_.tensors()) {
    if (!tensor.is_input && tensor.bound == tensor.home) {  // what is staged is only written by unstage_outputs()
      saved.emplace_back(&tensor, std::make_unique<DeviceMemory>(lanes_->device(), tensor.bytes));
      device_.copy(saved.back().second->get(), tensor.home, tensor.bytes, stream);
    }
  }
  const auto put_back = [&] {
    for (const auto& [tensor, memory] : saved) {
      device_.copy(tensor->home, memory->get(), tensor->bytes, stream);
    }
    device_.synchronize(stream);
  };
  try {
    plan_.stage_inputs(device_, stream);
    lane_.context->enqueue(stream);
    device_.synchronize(stream);
  } catch (...) {
    try {
      put_back();
    } catch (const Error&) {  // the GPU is gone: the first failure is the one to report
    }
    throw;
  }
  put_back();
  if (!std::exchange(lane_.used, true)) {
    lanes_->engine().warmed_up();
  }
}

void CapturedLaunch::capture() {
  device_.begin_capture(lane_.stream->get());
  try {
    enqueue(device_, plan_, lane_);
  } catch (...) {
    device_.abandon_capture(lane_.stream->get());
    throw;
  }
  graph_.reset(device_.end_capture(lane_.stream->get()));
}

TensorRtProgram::TensorRtProgram(const std::shared_ptr<Device>& device, const std::shared_ptr<LoadedEngine>& engine)
    : plain_lanes_(std::make_shared<Lanes>(device, engine, false)),
      captured_lanes_(std::make_shared<Lanes>(device, engine, true)) {
  for (const EngineTensor& tensor : engine->tensors()) {
    (tensor.is_input ? inputs_ : outputs_).push_back(tensor.spec);
  }
}

std::unique_ptr<Launch> TensorRtProgram::bind(const Binding& inputs, const Binding& outputs, bool repeated) {
  if (repeated) {
    return std::make_unique<CapturedLaunch>(captured_lanes_, inputs, outputs);
  }
  return std::make_unique<PlainLaunch>(plain_lanes_, inputs, outputs);
}

}  // namespace crt
