#include "tiny_session.hpp"

#include <doctest/doctest.h>

#include <cstddef>
#include <utility>

namespace crt_test {

std::string refused(const std::function<void()>& action, crt::ErrorKind kind) {
  try {
    action();
  } catch (const crt::Error& error) {
    CHECK(error.kind() == kind);
    return error.what();
  }
  return "";
}

TinySession::TinySession(std::int64_t batch, TinySizes sizes)
    : device(std::make_shared<RecordingDevice>()),
      engine(std::make_shared<RecordingEngine>(device, sizes)),
      streams(std::make_shared<crt::StreamPool>(device)),
      program(std::make_unique<crt::TensorRtProgram>(device, engine)) {
  for (std::size_t set = 0; set < 2; ++set) {
    ids[set] = allocate({batch, 1}, crt::DType::int64);
    position[set] = allocate({batch}, crt::DType::int64);
    state[set] = allocate({batch, 1, sizes.hidden}, crt::DType::float32);
  }
  cache = allocate({batch, 1, sizes.capacity, 1}, crt::DType::float32);
}

std::unique_ptr<crt::DeviceBuffer> TinySession::allocate(crt::Shape shape, crt::DType dtype) {
  return std::make_unique<crt::DeviceBuffer>(streams, std::move(shape), dtype);
}

crt::Binding TinySession::inputs(std::int64_t start, std::int64_t stop, int parity) {
  const auto set = static_cast<std::size_t>(parity);
  return {{"input_ids", {ids[set].get(), start, stop}},
          {"position", {position[set].get(), start, stop}},
          {"state", {state[set].get(), start, stop}},
          {"past_key_values.0.key", {cache.get(), start, stop}}};
}

crt::Binding TinySession::outputs(std::int64_t start, std::int64_t stop, int parity) {
  const auto set = static_cast<std::size_t>(1 - parity);
  return {{"next_token", {ids[set].get(), start, stop}},
          {"next_position", {position[set].get(), start, stop}},
          {"next_state", {state[set].get(), start, stop}},
          {"present_key_values.0.key", {cache.get(), start, stop}}};
}

std::unique_ptr<crt::Launch> TinySession::bind(std::int64_t start, std::int64_t stop, int parity, bool repeated) {
  return program->bind(inputs(start, stop, parity), outputs(start, stop, parity), repeated);
}

TinyRow::TinyRow(std::int64_t first_token, TinySizes sizes)
    : token(first_token),
      state(static_cast<std::size_t>(sizes.hidden), 0.0F),
      cache(static_cast<std::size_t>(sizes.capacity), 0.0F) {}

void TinyRow::step() {
  if (position < static_cast<std::int64_t>(cache.size())) {
    cache[static_cast<std::size_t>(position)] += static_cast<float>(token) + 1.0F;
  }
  float attended = 0.0F;
  for (const float entry : cache) {
    attended += entry;
  }
  for (std::size_t i = 0; i < state.size(); ++i) {
    state[i] = 0.5F * state[i] + static_cast<float>(token) + static_cast<float>(i) + attended;
  }
  token = static_cast<std::int64_t>(state[0]) % 97;
  ++position;
}

}  // namespace crt_test
