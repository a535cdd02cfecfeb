#include "tensorrt/cuda_device.hpp"

#include <cuda_runtime_api.h>

#include <string>

#include "crt_runtime/error.hpp"

namespace crt {
namespace {

bool is_absence(cudaError_t code) noexcept {
  switch (code) {
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorStubLibrary:
    case cudaErrorInitializationError:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorSystemNotReady:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorDevicesUnavailable: return true;
    default:
      return false;
  }
}

std::string failure(const std::string& call, cudaError_t code) {
  return call + " failed with " + cudaGetErrorName(code) + " (" + cudaGetErrorString(code) + ")";
}

void check(cudaError_t code, const std::string& call) {
  if (code == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // an error that does not stick is not found again by the next call
  if (is_absence(code)) {
    throw Error(ErrorKind::missing_dependency,
                "an NVIDIA GPU with a driver for CUDA " + std::to_string(CUDART_VERSION / 1000) +
                    " is needed, none can be used here: " + failure(call, code));
  }
  throw Error(ErrorKind::contract, failure(call, code));
}

// The plain text overload builds no string on the path that succeeds: it is taken in every step.
void check(cudaError_t code, const char* call) {
  if (code != cudaSuccess) check(code, std::string(call));
}

cudaStream_t cuda_stream(Stream stream) noexcept { return static_cast<cudaStream_t>(stream); }

class CudaDevice final : public Device {
 public:
  explicit CudaDevice(int ordinal) : ordinal_(ordinal) {}

  void make_current() override { check(cudaSetDevice(ordinal_), "cudaSetDevice"); }

  void* allocate(std::size_t bytes) override {
    make_current();
    void* memory = nullptr;
    const cudaError_t code = cudaMalloc(&memory, bytes);
    if (code != cudaSuccess) check(code, "cudaMalloc of " + std::to_string(bytes) + " bytes");
    return memory;
  }
  // Nothing can be done about a failure to free: the call that broke the GPU has reported it.
  void free(void* memory) noexcept override { static_cast<void>(cudaFree(memory)); }

  void* allocate_host(std::size_t bytes) override {
    make_current();
    void* memory = nullptr;
    const cudaError_t code = cudaHostAlloc(&memory, bytes, cudaHostAllocDefault);
    if (code != cudaSuccess) check(code, "cudaHostAlloc of " + std::to_string(bytes) + " bytes");
    return memory;
  }
  void free_host(void* memory) noexcept override { static_cast<void>(cudaFreeHost(memory)); }

  Stream create_stream() override {
    make_current();
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
    return stream;
  }
  void free_stream(Stream stream) noexcept override { static_cast<void>(cudaStreamDestroy(cuda_stream(stream))); }
  void synchronize(Stream stream) override {
    check(cudaStreamSynchronize(cuda_stream(stream)), "cudaStreamSynchronize");
  }

  void copy_to_device(void* to, const void* from, std::size_t bytes, Stream stream) override {
    copy_as(to, from, bytes, cudaMemcpyHostToDevice, stream);
  }
  void copy_to_host(void* to, const void* from, std::size_t bytes, Stream stream) override {
    copy_as(to, from, bytes, cudaMemcpyDeviceToHost, stream);
  }
  void copy(void* to, const void* from, std::size_t bytes, Stream stream) override {
    copy_as(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  }
  void fill_zero(void* memory, std::size_t pitch, std::size_t width, std::size_t height, Stream stream) override {
    make_current();
    if (height == 1) {  // a 2-D fill has a limit on its width, which a whole cache exceeds
      check(cudaMemsetAsync(memory, 0, width, cuda_stream(stream)), "cudaMemsetAsync");
    } else {
      check(cudaMemset2DAsync(memory, pitch, 0, width, height, cuda_stream(stream)), "cudaMemset2DAsync");
    }
  }

  void begin_capture(Stream stream) override {
    // Thread-local: what other threads allocate or free meanwhile neither fails nor spoils the capture.
    check(cudaStreamBeginCapture(cuda_stream(stream), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
  }
  GraphExec end_capture(Stream stream) override {
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(cuda_stream(stream), &graph), "cudaStreamEndCapture");
    cudaGraphExec_t ready = nullptr;
    const cudaError_t code = cudaGraphInstantiate(&ready, graph, 0);
    static_cast<void>(cudaGraphDestroy(graph));
    check(code, "cudaGraphInstantiate");
    return ready;
  }
  void abandon_capture(Stream stream) noexcept override {
    cudaGraph_t graph = nullptr;
    if (cudaStreamEndCapture(cuda_stream(stream), &graph) == cudaSuccess && graph != nullptr) {
      static_cast<void>(cudaGraphDestroy(graph));
    }
    static_cast<void>(cudaGetLastError());
  }
  void launch_graph(GraphExec graph, Stream stream) override {
    check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), cuda_stream(stream)), "cudaGraphLaunch");
  }
  void free_graph(GraphExec graph) noexcept override {
    static_cast<void>(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)));
  }

 private:
  void copy_as(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, Stream stream) {
    make_current();
    check(cudaMemcpyAsync(to, from, bytes, kind, cuda_stream(stream)), "cudaMemcpyAsync");
  }

  int ordinal_;
};

int attribute(cudaDeviceAttr name, int ordinal) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, ordinal), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

Gpu open_gpu() {
  int count = 0;
  check(cudaGetDeviceCount(&count), "cudaGetDeviceCount");
  if (count < 1) {
    throw Error(ErrorKind::missing_dependency,
                "an NVIDIA GPU is needed, the driver offers none (CUDA_VISIBLE_DEVICES?)");
  }
  int ordinal = 0;
  check(cudaGetDevice(&ordinal), "cudaGetDevice");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, ordinal);
  const int minor = attribute(cudaDevAttrComputeCapabilityMinor, ordinal);
  return Gpu{std::make_shared<CudaDevice>(ordinal), properties.name, 10 * major + minor};
}

}  // namespace crt
