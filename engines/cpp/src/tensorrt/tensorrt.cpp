// TensorRT (10.16 or newer, 11.x) and TensorRT-RTX behind the engine interface. The C++ twin of
// crt_export/engine/tensorrt/engine.py.
#include <algorithm>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "crt_runtime/error.hpp"
#include "engine/back_ends.hpp"
#include "engine/tensor_names.hpp"
#include "tensorrt/cuda_memory.hpp"
#include "tensorrt/tensorrt_api.hpp"
#include "tensorrt/tensorrt_launch.hpp"
#include "tensorrt/tensorrt_sidecar.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

constexpr std::size_t kMostPlanBytes = std::size_t{1} << 36;

class TensorRtEngine final : public Engine {
 public:
  TensorRtEngine(BundleFiles files, Target target)
      : files_(std::move(files)),
        target_(std::move(target)),
        gpu_(open_gpu()),
        streams_(std::make_shared<StreamPool>(gpu_.device)) {
    for (const char* graph : {names::kGraphStep, names::kGraphPrefill, names::kGraphPrefillPass}) {
      if (target_.engines.count(graph) != 0) take_sidecar(graph);
    }
    take_limits();
    api_ = start_tensorrt(sidecars_.at(names::kGraphStep).version_compatible);
    load(names::kGraphStep);
    load(names::kGraphPrefill);
  }

  std::int64_t max_tokens() const noexcept override { return max_tokens_; }
  std::optional<std::int64_t> max_batch() const noexcept override { return max_batch_; }
  std::optional<std::int64_t> fixed_capacity() const noexcept override { return capacity_; }
  bool host_memory() const noexcept override { return false; }

  Program& program(const std::string& graph) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(graph);
    if (found != programs_.end()) return *found->second;
    if (sidecars_.count(graph) == 0) {
      throw Error(ErrorKind::unsupported,
                  target_.name + " has no " + graph + " engine" +
                      (graph == names::kGraphPrefillPass ? ": run the number of passes it was compiled with, or build "
                                                           "with another --unroll"
                                                         : ""));
    }
    return load(graph);
  }

  std::unique_ptr<Buffer> allocate(Shape shape, DType dtype) override {
    return std::make_unique<DeviceBuffer>(streams_, std::move(shape), dtype);
  }

 private:
  /// All sidecars are checked when the target is opened, so that a call in the middle of a session finds no surprise.
  void take_sidecar(const std::string& graph) {
    const std::string& file = target_.engines.at(graph);
    EngineSidecar sidecar = read_sidecar(files_, file);
    check_sidecar(file, sidecar, target_, graph, {tensorrt_version(), gpu_.name, gpu_.compute_capability});
    sidecars_.emplace(graph, std::move(sidecar));
  }

  /// What the engines were compiled for, which is what TensorRT goes by.
  void take_limits() {
    max_tokens_ = target_.max_tokens;
    max_batch_ = target_.max_batch;
    capacity_ = sidecars_.at(names::kGraphStep).capacity;
    for (const auto& [graph, sidecar] : sidecars_) {
      if (sidecar.capacity != capacity_) {
        throw Error(ErrorKind::bundle, "the caches of " + target_.name + " hold " + std::to_string(capacity_) +
                                           " tokens in step and " + std::to_string(sidecar.capacity) + " in " + graph +
                                           "; build the bundle again");
      }
      const auto ids = sidecar.input_shapes.find(names::kInputIds);
      if (ids != sidecar.input_shapes.end() && ids->second[2].size() == 2) {
        max_batch_ = std::min(max_batch_, ids->second[2][0]);
        max_tokens_ = graph == names::kGraphStep ? max_tokens_ : std::min(max_tokens_, ids->second[2][1]);
      }
    }
  }

  Program& load(const std::string& graph) {
    gpu_.device->make_current();
    const EngineSidecar& sidecar = sidecars_.at(graph);
    const std::string& file = target_.engines.at(graph);
    const std::shared_ptr<LoadedEngine> engine =
        load_plan(api_, {target_.name + " " + graph, files_.path() + "/" + file, files_.content(file, kMostPlanBytes),
                         sidecar.ampere_plus});
    auto program = std::make_unique<TensorRtProgram>(gpu_.device, engine);
    std::vector<std::string> problems = contract_problems(files_.contract(graph), target_, graph, *program);
    for (const std::string& problem : engine_problems(engine->tensors(), sidecar, files_.contract(graph))) {
      problems.push_back(graph + ": " + problem);
    }
    refuse_broken_contract(target_, problems);
    return *(programs_[graph] = std::move(program));
  }

  BundleFiles files_;  // a copy, because the engine may outlive the bundle
  Target target_;
  Gpu gpu_;
  std::shared_ptr<StreamPool> streams_;
  std::map<std::string, EngineSidecar> sidecars_;
  std::int64_t max_tokens_ = 0;
  std::int64_t max_batch_ = 0;
  std::int64_t capacity_ = 0;
  std::shared_ptr<TensorRtApi> api_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<TensorRtProgram>> programs_;  // the first to go
};

std::shared_ptr<Engine> open(const BundleFiles& files, const Target& target) {
  std::vector<std::string> missing;
  for (const char* graph : {names::kGraphStep, names::kGraphPrefill}) {
    if (target.engines.count(graph) == 0) missing.emplace_back(graph);
  }
  if (!missing.empty()) {
    throw Error(ErrorKind::bundle, files.path() + ": target " + target.name + " has no " + joined(missing, " and no ") +
                                       " engine; build it again");
  }
  return std::make_shared<TensorRtEngine>(files, target);
}

}  // namespace

#ifdef CRT_RUNTIME_TENSORRT
std::shared_ptr<Engine> open_tensorrt(BundleFiles& files, const Target& target) { return open(files, target); }
#endif

#ifdef CRT_RUNTIME_TENSORRT_RTX
std::shared_ptr<Engine> open_tensorrt_rtx(BundleFiles& files, const Target& target) { return open(files, target); }
#endif

}  // namespace crt
