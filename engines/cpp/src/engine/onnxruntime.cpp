// ONNX Runtime on a CPU: loads graphs, binds tensors by address, runs them. The C++ twin of
// crt_export/engine/onnxruntime.py.
#include <onnxruntime_cxx_api.h>

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "crt_runtime/error.hpp"
#include "engine/back_ends.hpp"
#include "engine/engine.hpp"
#include "engine/onnxruntime_loading.hpp"
#include "engine/memory_map.hpp"
#include "engine/tensor_names.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

constexpr char kBlockBase[] = "4";

/// Switches off the telemetry of ONNX Runtime's wheels, which is on by default from 1.29 on: it writes a device id
/// below the home folder and sends events. The environment reads this while it is made; its own API comes too late. A
/// value that the user gave stands. An application that made an Ort::Env before has decided for itself.
void disable_telemetry() {
  constexpr char kSwitch[] = "ORT_DISABLE_TELEMETRY";
  const char* given = std::getenv(kSwitch);
  if (given == nullptr || *given == '\0') setenv(kSwitch, "1", 1);
}

/// One environment for the process; engines share it, so that it goes after the last of them, even at exit.
std::shared_ptr<Ort::Env> environment() {
  if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
    throw Error(ErrorKind::missing_dependency,
                std::string("libonnxruntime is version ") + OrtGetApiBase()->GetVersionString() +
                    ", and this library was compiled against the headers of 1." + std::to_string(ORT_API_VERSION) +
                    ": install that version or a newer one");
  }
  static const std::shared_ptr<Ort::Env> shared = [] {
    disable_telemetry();
    // Errors reach the caller as exceptions, so nothing is printed as well.
    return std::make_shared<Ort::Env>(ORT_LOGGING_LEVEL_FATAL, "crt_runtime");
  }();
  return shared;
}

GraphOptimizationLevel level_of(const std::string& name) {
  static const std::map<std::string, GraphOptimizationLevel> levels{{"disable", ORT_DISABLE_ALL},
                                                                    {"basic", ORT_ENABLE_BASIC},
                                                                    {"extended", ORT_ENABLE_EXTENDED},
                                                                    {"all", ORT_ENABLE_ALL}};
  const auto found = levels.find(name);
  if (found == levels.end()) {
    throw Error(ErrorKind::bundle,
                "options.graph_optimization must be one of disable, basic, extended, all, not '" + name + "'");
  }
  return found->second;
}

Ort::SessionOptions session_options(const OrtProfile& profile, int threads, bool stop_spinning) {
  Ort::SessionOptions options;
  options.SetLogSeverityLevel(ORT_LOGGING_LEVEL_FATAL);
  options.SetIntraOpNumThreads(threads);
  options.SetInterOpNumThreads(1);
  options.SetGraphOptimizationLevel(level_of(profile.graph_optimization));
  // Threads take a loop in ever smaller pieces, so that one which is held up does not keep the others waiting.
  options.AddConfigEntry("session.dynamic_block_base", kBlockBase);
  options.AddConfigEntry("session.intra_op.allow_spinning", profile.spinning ? "1" : "0");
  if (stop_spinning) options.AddConfigEntry("session.force_spinning_stop", "1");
  if (!profile.disabled_optimizers.empty()) {
    options.AddConfigEntry("optimization.disable_specified_optimizers",
                           joined(profile.disabled_optimizers, ";").c_str());
  }
  return options;
}

ONNXTensorElementDataType element_type_of(DType dtype) {
  switch (dtype) {
    case DType::int64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case DType::float32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::float16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

TensorSpec spec_of(const std::string& file, const std::string& name, const Ort::TypeInfo& type) {
  const auto known = "; the contract knows int64, float32 and float16";
  if (type.GetONNXType() != ONNX_TYPE_TENSOR) {
    throw Error(ErrorKind::contract, file + ": " + name + " is no tensor" + known);
  }
  const auto tensor = type.GetTensorTypeAndShapeInfo();
  for (const DType dtype : {DType::int64, DType::float32, DType::float16}) {
    if (tensor.GetElementType() == element_type_of(dtype)) return TensorSpec{name, dtype, tensor.GetShape()};
  }
  throw Error(ErrorKind::contract, file + ": " + name + " has ONNX element type " +
                                       std::to_string(static_cast<int>(tensor.GetElementType())) + known);
}

/// The process that a graph was loaded in: fork copies none of its threads.
class Process {
 public:
  explicit Process(int threads) : id_(getpid()), threads_(threads) {}

  bool forked() const noexcept { return getpid() != id_; }

  /// Refuses what would wait for ever; a graph of one thread needs none but the caller's.
  void require_threads(const std::string& file) const {
    if (threads_ != 1 && forked()) {
      throw Error(ErrorKind::unsupported,
                  file + " was loaded before this process was forked, and its threads stayed in the parent: open the "
                         "bundle's session after the fork, or with threads = 1");
    }
  }

 private:
  pid_t id_;
  int threads_;
};

class OrtLaunch final : public Launch {
 public:
  OrtLaunch(Ort::Session& session, const std::string& file, const Process& process, const Binding& inputs,
            const Binding& outputs)
      : session_(session), file_(file), process_(process), binding_(session) {
    for (const auto& [name, rows] : inputs) binding_.BindInput(name.c_str(), value_of(rows));
    for (const auto& [name, rows] : outputs) binding_.BindOutput(name.c_str(), value_of(rows));
  }

  void run() override {
    process_.require_threads(file_);
    try {
      session_.Run(Ort::RunOptions{nullptr}, binding_);
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::contract, "ONNX Runtime failed in " + file_ + ": " + error.what());
    }
  }

 private:
  static Ort::Value value_of(const BufferSlice& rows) {
    const auto place = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
    const Shape shape = rows.shape();
    return Ort::Value::CreateTensor(place, rows.address(), rows.bytes(), shape.data(), shape.size(),
                                    element_type_of(rows.buffer->dtype()));
  }

  Ort::Session& session_;
  const std::string& file_;
  const Process& process_;
  Ort::IoBinding binding_;
};

class OrtProgram final : public Program {
 public:
  OrtProgram(const Ort::Env& environment, const HeldGraph& graph, const OrtProfile& profile, int threads,
             bool stop_spinning)
      : file_(graph.path.substr(graph.path.find_last_of('/') + 1)),
        process_(threads),
        session_(load(environment, graph, profile, threads, stop_spinning)) {
    const Ort::AllocatorWithDefaultOptions allocator;
    for (std::size_t index = 0; index < session_.GetInputCount(); ++index) {
      const auto name = session_.GetInputNameAllocated(index, allocator);
      inputs_.push_back(spec_of(file_, name.get(), session_.GetInputTypeInfo(index)));
    }
    for (std::size_t index = 0; index < session_.GetOutputCount(); ++index) {
      const auto name = session_.GetOutputNameAllocated(index, allocator);
      outputs_.push_back(spec_of(file_, name.get(), session_.GetOutputTypeInfo(index)));
    }
  }

  ~OrtProgram() override {
    if (process_.forked()) {
      session_.release();  // its end would wait for threads that are in the parent
    }
  }
  OrtProgram(const OrtProgram&) = delete;
  OrtProgram& operator=(const OrtProgram&) = delete;

  const std::vector<TensorSpec>& inputs() const noexcept override { return inputs_; }
  const std::vector<TensorSpec>& outputs() const noexcept override { return outputs_; }

  std::unique_ptr<Launch> bind(const Binding& inputs, const Binding& outputs, bool /*repeated*/) override {
    try {
      return std::make_unique<OrtLaunch>(session_, file_, process_, inputs, outputs);
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::contract, "ONNX Runtime cannot bind " + file_ + ": " + error.what());
    }
  }

 private:
  static Ort::Session load(const Ort::Env& environment, const HeldGraph& graph, const OrtProfile& profile, int threads,
                           bool stop_spinning) {
    const LoadGraph load = [&](const std::string& model, const std::function<void(Ort::SessionOptions&)>& add) {
      Ort::SessionOptions options = session_options(profile, threads, stop_spinning);
      add(options);
      Ort::Session session{nullptr};
      allocated_in_huge_pages(profile.huge_pages, [&] {
        session = Ort::Session(environment, model.data(), model.size(), options);
      });
      return session;
    };
    try {
      return load_held_graph(graph, load, profile.mmap);
    } catch (const Ort::Exception& error) {
      throw Error(ErrorKind::contract, graph.path + ": ONNX Runtime cannot load it (" + error.what() + ")");
    }
  }

  std::string file_;
  Process process_;
  Ort::Session session_;
  std::vector<TensorSpec> inputs_;
  std::vector<TensorSpec> outputs_;
};

class OrtEngine final : public Engine {
 public:
  /// one_graph: the graph that makes steps as well; "" where there is a step.
  OrtEngine(BundleFiles files, Target target, int threads, std::string one_graph)
      : environment_(environment()),
        files_(std::move(files)),
        target_(std::move(target)),
        threads_(threads),
        one_graph_(std::move(one_graph)) {
    std::vector<std::string> loaded{names::kGraphStep, names::kGraphPrefill};
    if (!one_graph_.empty()) loaded = {one_graph_};
    std::vector<std::string> problems;
    for (const std::string& graph : loaded) {
      const std::vector<std::string> found = contract_problems(files_.contract(graph), target_, graph, load(graph));
      problems.insert(problems.end(), found.begin(), found.end());
    }
    refuse_broken_contract(target_, problems);
  }

  std::int64_t max_tokens() const noexcept override { return target_.max_tokens; }
  std::optional<std::int64_t> max_batch() const noexcept override { return std::nullopt; }
  std::optional<std::int64_t> fixed_capacity() const noexcept override { return std::nullopt; }
  bool host_memory() const noexcept override { return true; }
  bool one_graph() const noexcept override { return !one_graph_.empty(); }

  Program& program(const std::string& asked) override {
    const std::string& graph = asked == names::kGraphStep ? step_graph() : asked;
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = programs_.find(graph);
    if (found != programs_.end()) return *found->second;
    if (one_graph() || graph != names::kGraphPrefillPass || target_.graphs.count(graph) == 0) {
      throw Error(ErrorKind::unsupported, "this target has no " + graph + " graph");
    }
    Program& loaded = load(graph);
    const std::vector<std::string> problems = contract_problems(files_.contract(graph), target_, graph, loaded);
    if (!problems.empty()) programs_.erase(graph);
    refuse_broken_contract(target_, problems);
    return loaded;
  }

  std::unique_ptr<Buffer> allocate(Shape shape, DType dtype) override {
    return std::make_unique<HostBuffer>(std::move(shape), dtype);
  }

 private:
  const std::string& step_graph() const noexcept { return one_graph() ? one_graph_ : step_; }

  Program& load(const std::string& graph) {
    // Only the step's threads spin on between calls: two spinning pools in one thread double its time.
    const bool stop_spinning = graph != step_graph();
    return *(programs_[graph] = std::make_unique<OrtProgram>(*environment_, files_.graph(target_.graphs.at(graph)),
                                                             target_.ort, threads_, stop_spinning));
  }

  std::shared_ptr<Ort::Env> environment_;
  BundleFiles files_;  // a copy, because the engine may outlive the bundle
  Target target_;
  int threads_;
  std::string step_ = names::kGraphStep;
  std::string one_graph_;
  std::mutex mutex_;
  std::map<std::string, std::unique_ptr<OrtProgram>> programs_;
};

}  // namespace

std::shared_ptr<Engine> open_onnxruntime(BundleFiles& files, const Target& target, int threads) {
  std::vector<std::string> missing;
  for (const char* graph : {names::kGraphStep, names::kGraphPrefill}) {
    if (target.graphs.count(graph) == 0) missing.emplace_back(graph);
  }
  if (!missing.empty()) {
    throw Error(ErrorKind::bundle, files.path() + ": target " + target.name + " has no " + joined(missing, " and no ") +
                                       " graph; build it again");
  }
  const char* one_graph = files.config().iterated ? names::kGraphPrefillPass : names::kGraphPrefill;
  return std::make_shared<OrtEngine>(files, target, threads, target.graphs.count(one_graph) == 0 ? "" : one_graph);
}

}  // namespace crt
