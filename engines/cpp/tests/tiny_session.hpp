// What a session does with a tiny graph: buffers in pairs, one launch per parity, and the same steps on the host.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "crt_runtime/error.hpp"
#include "recording_engine.hpp"
#include "tensorrt/cuda_memory.hpp"
#include "tensorrt/tensorrt_launch.hpp"

namespace crt_test {

/// The text of the Error of this kind that the action throws; "" if it throws none, fails the test for another kind.
std::string refused(const std::function<void()>& action, crt::ErrorKind kind = crt::ErrorKind::contract);

/// Copy of a buffer's content.
template <typename Element>
std::vector<Element> values_of(crt::Buffer& buffer) {
  const auto* first = static_cast<const Element*>(buffer.read());
  return std::vector<Element>(first, first + buffer.bytes() / sizeof(Element));
}

template <typename Element>
void put(crt::Buffer& buffer, const std::vector<Element>& values) {
  buffer.write(values.data());
}

/// The tensors of a session on a recording device.
class TinySession {
 public:
  explicit TinySession(std::int64_t batch, TinySizes sizes = {});

  /// The launch of rows start to stop that reads set `parity` and writes the other one.
  std::unique_ptr<crt::Launch> bind(std::int64_t start, std::int64_t stop, int parity, bool repeated = true);
  crt::Binding inputs(std::int64_t start, std::int64_t stop, int parity);
  crt::Binding outputs(std::int64_t start, std::int64_t stop, int parity);
  std::unique_ptr<crt::DeviceBuffer> allocate(crt::Shape shape, crt::DType dtype);

  std::shared_ptr<RecordingDevice> device;
  std::shared_ptr<RecordingEngine> engine;
  std::shared_ptr<crt::StreamPool> streams;
  std::unique_ptr<crt::TensorRtProgram> program;
  std::array<std::unique_ptr<crt::DeviceBuffer>, 2> ids;
  std::array<std::unique_ptr<crt::DeviceBuffer>, 2> position;
  std::array<std::unique_ptr<crt::DeviceBuffer>, 2> state;
  std::unique_ptr<crt::DeviceBuffer> cache;
};

/// The tiny graph computed on the host, one row.
struct TinyRow {
  explicit TinyRow(std::int64_t first_token, TinySizes sizes = {});
  void step();

  std::int64_t token;
  std::int64_t position = 0;
  std::vector<float> state;
  std::vector<float> cache;
};

}  // namespace crt_test
