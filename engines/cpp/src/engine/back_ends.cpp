#include "engine/back_ends.hpp"

#include <vector>

#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

enum class BackEnd { none, onnxruntime, tensorrt, tensorrt_rtx };

/// The back end of this build for a target; none if it was left out.
BackEnd back_end_of(const Target& target) noexcept {
#ifdef CRT_RUNTIME_ONNXRUNTIME
  // Copies to and from a GPU need CUDA, which the ONNX Runtime back end is built without.
  if (target.runtime == "onnxruntime" && target.device == "cpu") return BackEnd::onnxruntime;
#endif
#ifdef CRT_RUNTIME_TENSORRT
  if (target.runtime == "tensorrt") return BackEnd::tensorrt;
#endif
#ifdef CRT_RUNTIME_TENSORRT_RTX
  if (target.runtime == "tensorrt-rtx") return BackEnd::tensorrt_rtx;
#endif
  static_cast<void>(target);
  return BackEnd::none;
}

std::string runnable_targets() {
  std::vector<std::string> names;
#ifdef CRT_RUNTIME_ONNXRUNTIME
  names.emplace_back("ONNX Runtime on a CPU (ort-cpu-...)");
#endif
#ifdef CRT_RUNTIME_TENSORRT
  names.emplace_back("TensorRT (trt-...)");
#endif
#ifdef CRT_RUNTIME_TENSORRT_RTX
  names.emplace_back("TensorRT-RTX (rtx-...)");
#endif
  return names.empty() ? "no runtime at all" : joined(names, " and ");
}

}  // namespace

bool runs_here(const Target& target) noexcept { return back_end_of(target) != BackEnd::none; }

std::shared_ptr<Engine> open_engine(BundleFiles& files, const Target& target, int threads) {
  static_cast<void>(files);
  static_cast<void>(threads);
  switch (back_end_of(target)) {
#ifdef CRT_RUNTIME_ONNXRUNTIME
    case BackEnd::onnxruntime: return open_onnxruntime(files, target, threads);
#endif
#ifdef CRT_RUNTIME_TENSORRT
    case BackEnd::tensorrt: return open_tensorrt(files, target);
#endif
#ifdef CRT_RUNTIME_TENSORRT_RTX
    case BackEnd::tensorrt_rtx: return open_tensorrt_rtx(files, target);
#endif
    default:
      break;
  }
  throw Error(ErrorKind::unsupported, target.name + " runs on " + target.runtime + " (" + target.device +
                                          "); this library was built for " + runnable_targets() +
                                          ": choose such a target, or build the library with that back end");
}

}  // namespace crt
