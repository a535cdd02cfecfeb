// The back ends this library was built with; each is one translation unit chosen by a CMake option.
#pragma once

#include <memory>

#include "bundle/bundle_files.hpp"
#include "engine/engine.hpp"

namespace crt {

/// Whether this build runs the target's runtime and device.
bool runs_here(const Target& target) noexcept;
/// Check the target's files, load its graphs; throws Error(unsupported) if the back end was left out of this build.
std::shared_ptr<Engine> open_engine(BundleFiles& files, const Target& target, int threads);

#ifdef CRT_RUNTIME_ONNXRUNTIME
std::shared_ptr<Engine> open_onnxruntime(BundleFiles& files, const Target& target, int threads);
#endif
#ifdef CRT_RUNTIME_TENSORRT
std::shared_ptr<Engine> open_tensorrt(BundleFiles& files, const Target& target);
#endif
#ifdef CRT_RUNTIME_TENSORRT_RTX
std::shared_ptr<Engine> open_tensorrt_rtx(BundleFiles& files, const Target& target);
#endif

}  // namespace crt
