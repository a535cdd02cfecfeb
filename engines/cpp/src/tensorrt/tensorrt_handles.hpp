// What keeps TensorRT's objects alive and in order. Only the tensorrt_*.cpp files that call TensorRT include this; the
// same sources compile against the headers of TensorRT 10.16 or newer, 11.x, and TensorRT-RTX.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <mutex>
#include <string>

#include "crt_runtime/error.hpp"
#include "tensorrt/tensorrt_log.hpp"

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

#ifdef TRT_MAJOR_RTX
inline constexpr const char* kProduct = "TensorRT-RTX";
#else
inline constexpr const char* kProduct = "TensorRT";
#endif

/// What TensorRT logged as an error since it was last asked.
RuntimeLog& runtime_log() noexcept;
/// Throws an Error of `what` and TensorRT's reason.
[[noreturn]] void refuse(const std::string& what, ErrorKind kind = ErrorKind::contract);

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

}  // namespace crt
