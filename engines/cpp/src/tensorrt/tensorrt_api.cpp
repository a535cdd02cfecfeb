// The only file that calls TensorRT: what keeps its objects alive and in order. It compiles against the headers of
// TensorRT 10.16 or newer, 11.x, and TensorRT-RTX.
#include "tensorrt/tensorrt_api.hpp"

#include <NvInfer.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <utility>
#include <vector>

#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"
#include "tensorrt/tensorrt_cache.hpp"
#include "tensorrt/tensorrt_log.hpp"
#include "text/messages.hpp"

#if defined(CRT_RUNTIME_TENSORRT_RTX) != defined(TRT_MAJOR_RTX)
#error "these are the headers of the other product: check TENSORRT_ROOT and TENSORRT_RTX_ROOT"
#endif
#if !defined(TRT_MAJOR_RTX) && NV_TENSORRT_MAJOR * 100 + NV_TENSORRT_MINOR < 1016
#error "TensorRT 10.16 or newer is needed: older ones do not update caches in place"
#endif
#if defined(TRT_MAJOR_RTX) && TRT_MAJOR_RTX * 100 + TRT_MINOR_RTX < 105
#error "TensorRT-RTX 1.5 or newer is needed: older ones cannot be asked whether a run can be captured"
#endif

namespace crt {

/// A runtime; its logger lives as long as the process.
class TensorRtApi {
 public:
  TensorRtApi();
  nvinfer1::IRuntime& runtime() noexcept { return *runtime_; }
  /// A runtime deserialises one engine at a time.
  std::mutex& mutex() noexcept { return mutex_; }

 private:
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::mutex mutex_;
};

namespace {

#ifdef TRT_MAJOR_RTX
inline constexpr const char* kProduct = "TensorRT-RTX";
#else
inline constexpr const char* kProduct = "TensorRT";
#endif

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) errors_.keep(message);
  }
  RuntimeLog& errors() noexcept { return errors_; }

 private:
  RuntimeLog errors_;
};

// Never destroyed, because TensorRT logs until its last object is gone, and the application may hold an engine in a
// static object of its own.
Logger& logger() noexcept {
  alignas(Logger) static unsigned char storage[sizeof(Logger)];
  static auto* const made = ::new (static_cast<void*>(storage)) Logger;
  return *made;
}

/// What TensorRT logged as an error since it was last asked.
RuntimeLog& runtime_log() noexcept { return logger().errors(); }

/// Throws an Error of `what` and TensorRT's reason.
[[noreturn]] void refuse(const std::string& what, ErrorKind kind = ErrorKind::contract) {
  const std::string said = runtime_log().take();
  throw Error(kind, what + " (" + (said.empty() ? "no reason given" : said) + ")");
}

/// An engine and what must outlive it. Members die in reverse order, so the engine goes before its runtime; contexts
/// hold this, so they go first.
struct EngineHandle {
  std::shared_ptr<TensorRtApi> api;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
#ifdef TRT_MAJOR_RTX
  std::unique_ptr<nvinfer1::IRuntimeCache> cache;
#endif
  std::string label;
  std::mutex mutex;  // an engine makes one context at a time
};

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

/// An execution context of the real TensorRT.
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

DType dtype_of(nvinfer1::DataType type, const std::string& where) {
  switch (type) {
    case nvinfer1::DataType::kINT64: return DType::int64;
    case nvinfer1::DataType::kFLOAT: return DType::float32;
    case nvinfer1::DataType::kHALF: return DType::float16;
    default:
      throw Error(ErrorKind::contract, where + " has TensorRT's data type " + std::to_string(static_cast<int>(type)) +
                                           "; the contract knows int64, float32 and float16");
  }
}

Shape shape_of(const nvinfer1::Dims& dims) { return Shape(dims.d, dims.d + (dims.nbDims > 0 ? dims.nbDims : 0)); }

EngineTensor tensor_of(const nvinfer1::ICudaEngine& engine, const char* name, const std::string& label) {
  const std::string where = label + ": " + name;
  if (engine.getTensorLocation(name) != nvinfer1::TensorLocation::kDEVICE) {
    throw Error(ErrorKind::contract, where + " was expected in the GPU's memory, the engine wants it on the host");
  }
  EngineTensor tensor;
  const DType dtype = dtype_of(engine.getTensorDataType(name), where);
  tensor.spec = TensorSpec{name, dtype, shape_of(engine.getTensorShape(name))};
  tensor.is_input = engine.getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
  if (tensor.is_input) {
    tensor.least = shape_of(engine.getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMIN));
    tensor.most = shape_of(engine.getProfileShape(name, 0, nvinfer1::OptProfileSelector::kMAX));
  } else {
    const char* alias = engine.getAliasedInputTensor(name);
    tensor.alias = alias == nullptr ? "" : alias;
  }
  return tensor;
}

class TensorRtLoadedEngine final : public LoadedEngine {
 public:
  TensorRtLoadedEngine(std::shared_ptr<EngineHandle> handle, const std::string& cache_name)
      : handle_(std::move(handle)), cache_file_(cache_name) {
    const nvinfer1::ICudaEngine& engine = *handle_->engine;
    for (std::int32_t index = 0; index < engine.getNbIOTensors(); ++index) {
      tensors_.push_back(tensor_of(engine, engine.getIOTensorName(index), handle_->label));
    }
    load_cache();
  }
  ~TensorRtLoadedEngine() override { keep_cache(); }
  TensorRtLoadedEngine(const TensorRtLoadedEngine&) = delete;
  TensorRtLoadedEngine& operator=(const TensorRtLoadedEngine&) = delete;

  const std::string& label() const noexcept override { return handle_->label; }
  const std::vector<EngineTensor>& tensors() const noexcept override { return tensors_; }
  std::unique_ptr<ExecutionContext> create_context(bool captured) override {
    const std::lock_guard<std::mutex> lock(handle_->mutex);
    return std::make_unique<TensorRtContext>(handle_, captured);
  }
  void warmed_up() noexcept override { keep_cache(); }

 private:
  void load_cache() {
#ifdef TRT_MAJOR_RTX
    const std::unique_ptr<nvinfer1::IRuntimeConfig> config(handle_->engine->createRuntimeConfig());
    if (config == nullptr) return;
    handle_->cache.reset(config->createRuntimeCache());
    const std::string kept = cache_file_.load();
    if (handle_->cache != nullptr && !kept.empty()) {
      // False, and an empty cache, for another version, driver or GPU.
      static_cast<void>(handle_->cache->deserialize(kept.data(), kept.size()));
    }
    static_cast<void>(runtime_log().take());
#endif
  }

  void keep_cache() noexcept {
#ifdef TRT_MAJOR_RTX
    if (handle_->cache == nullptr) return;
    const std::unique_ptr<nvinfer1::IHostMemory> content(handle_->cache->serialize());
    if (content != nullptr) cache_file_.store(content->data(), content->size());
#endif
  }

  std::shared_ptr<EngineHandle> handle_;
  RuntimeCacheFile cache_file_;
  std::vector<EngineTensor> tensors_;
};

#ifdef TRT_MAJOR_RTX
std::string diagnosis_text(std::uint64_t diagnosis) {
  using Reason = nvinfer1::EngineInvalidityDiagnostics;
  const std::pair<Reason, const char*> reasons[] = {
      {Reason::kVERSION_MISMATCH, "it was built by another version of TensorRT-RTX"},
      {Reason::kUNSUPPORTED_CC, "it was not built for this GPU's compute capability"},
      {Reason::kOLD_CUDA_DRIVER, "the CUDA driver is older than when it was built"},
      {Reason::kOLD_CUDA_RUNTIME, "the CUDA runtime is older than when it was built"},
      {Reason::kINSUFFICIENT_GPU_MEMORY, "the GPU has too little memory for its weights"},
      {Reason::kMALFORMED_ENGINE, "it is no engine, or damaged"},
      {Reason::kCUDA_ERROR, "CUDA is not installed correctly"},
  };
  std::string text;
  for (const auto& [reason, meaning] : reasons) {
    if ((diagnosis & static_cast<std::uint64_t>(reason)) != 0) {
      text += (text.empty() ? "" : ", ") + std::string(meaning);
    }
  }
  return text;
}

// Says why, where deserialising would only say that.
void check_validity(const nvinfer1::IRuntime& runtime, const PlanSource& source) {
  const auto size = static_cast<std::int64_t>(source.plan.size());
  std::uint64_t diagnosis = 0;
  if (size >= runtime.getEngineHeaderSize() &&
      runtime.getEngineValidity(source.plan.data(), size, &diagnosis) == nvinfer1::EngineValidity::kINVALID) {
    const auto damaged = static_cast<std::uint64_t>(nvinfer1::EngineInvalidityDiagnostics::kMALFORMED_ENGINE);
    const std::string why = diagnosis_text(diagnosis);
    refuse(source.path + " cannot run on this machine" + (why.empty() ? "" : ": " + why),
           (diagnosis & damaged) != 0 ? ErrorKind::contract : ErrorKind::missing_dependency);
  }
}
#else
void check_hardware(const nvinfer1::ICudaEngine& engine, const PlanSource& source) {
  constexpr auto kWanted = nvinfer1::HardwareCompatibilityLevel::kAMPERE_PLUS;
  if (source.ampere_plus && engine.getHardwareCompatibilityLevel() != kWanted) {
    throw Error(ErrorKind::contract, source.path + ": AMPERE_PLUS was asked for and silently not applied when the "
                                                   "engine was built; build the bundle again");
  }
}
#endif

}  // namespace

TensorRtApi::TensorRtApi() : runtime_(nvinfer1::createInferRuntime(logger())) {
  if (runtime_ == nullptr) {
    refuse(std::string(kProduct) + " " + tensorrt_version() + " does not start", ErrorKind::missing_dependency);
  }
}

std::string tensorrt_version() {
  return std::to_string(getInferLibMajorVersion()) + "." + std::to_string(getInferLibMinorVersion()) + "." +
         std::to_string(getInferLibPatchVersion()) + "." + std::to_string(getInferLibBuildVersion());
}

std::shared_ptr<TensorRtApi> start_tensorrt(bool version_compatible) {
  static_cast<void>(runtime_log().take());
  auto api = std::make_shared<TensorRtApi>();
  api->runtime().setEngineHostCodeAllowed(version_compatible);
  return api;
}

std::shared_ptr<LoadedEngine> load_plan(const std::shared_ptr<TensorRtApi>& api, const PlanSource& source) {
  auto handle = std::make_shared<EngineHandle>();
  handle->api = api;
  handle->label = source.label;
  const std::lock_guard<std::mutex> lock(api->mutex());
  static_cast<void>(runtime_log().take());
#ifdef TRT_MAJOR_RTX
  check_validity(api->runtime(), source);
#endif
  handle->engine.reset(api->runtime().deserializeCudaEngine(source.plan.data(), source.plan.size()));
  if (handle->engine == nullptr) {
    refuse(source.path + ": " + kProduct + " " + tensorrt_version() + " cannot load this engine of " +
           std::to_string(source.plan.size()) + " bytes; build the bundle again on this machine");
  }
#ifndef TRT_MAJOR_RTX  // TensorRT-RTX has no such levels
  check_hardware(*handle->engine, source);
#endif
  const std::string hash = sha256_hex(source.plan.data(), source.plan.size());
  return std::make_shared<TensorRtLoadedEngine>(std::move(handle), tensorrt_version() + "/" + hash.substr(0, 32));
}

}  // namespace crt
