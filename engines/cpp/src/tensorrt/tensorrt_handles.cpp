#include "tensorrt/tensorrt_handles.hpp"

#include <new>

#include "tensorrt/tensorrt_api.hpp"

namespace crt {

namespace {

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

}  // namespace

RuntimeLog& runtime_log() noexcept { return logger().errors(); }

void refuse(const std::string& what, ErrorKind kind) {
  const std::string said = runtime_log().take();
  throw Error(kind, what + " (" + (said.empty() ? "no reason given" : said) + ")");
}

TensorRtApi::TensorRtApi() : runtime_(nvinfer1::createInferRuntime(logger())) {
  if (runtime_ == nullptr) {
    refuse(std::string(kProduct) + " " + tensorrt_version() + " does not start", ErrorKind::missing_dependency);
  }
}

}  // namespace crt
