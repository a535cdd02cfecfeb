#include "recording_device.hpp"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "crt_runtime/error.hpp"

namespace crt_test {

namespace {

using Lock = std::lock_guard<std::recursive_mutex>;

constexpr std::size_t kAlignment = 256;

[[noreturn]] void misuse(const std::string& what) { throw std::logic_error("recording device: " + what); }

}  // namespace

RecordingDevice::~RecordingDevice() {
  for (const auto& entry : device_) {
    std::free(const_cast<unsigned char*>(entry.first));
  }
  for (const auto& entry : host_) {
    std::free(const_cast<unsigned char*>(entry.first));
  }
}

void RecordingDevice::record(const std::string& call) {
  ++counts_[call];
  if (call == failing_) {
    throw crt::Error(crt::ErrorKind::contract, call + " failed with cudaErrorMadeUp (as the test asked)");
  }
}

int RecordingDevice::count(const std::string& call) {
  const Lock lock(mutex_);
  return counts_[call];
}

std::size_t RecordingDevice::left() {
  const Lock lock(mutex_);
  return device_.size() + host_.size() + streams_.size() + graphs_.size();
}

void* RecordingDevice::make(std::size_t bytes, std::map<const unsigned char*, std::size_t>& sizes) {
  void* memory = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  std::memset(memory, 0xFF, bytes);  // NaN as a float, -1 as a token: whoever reads it without writing is found out
  sizes.emplace(static_cast<unsigned char*>(memory), bytes);
  return memory;
}

void RecordingDevice::drop(void* memory, std::map<const unsigned char*, std::size_t>& sizes) noexcept {
  const Lock lock(mutex_);
  if (sizes.erase(static_cast<unsigned char*>(memory)) == 1) {
    std::free(memory);
  } else {
    ++counts_["bad free"];
  }
}

void* RecordingDevice::allocate(std::size_t bytes) {
  const Lock lock(mutex_);
  record("allocate");
  return make(bytes, device_);
}

void RecordingDevice::free(void* memory) noexcept { drop(memory, device_); }

void* RecordingDevice::allocate_host(std::size_t bytes) {
  const Lock lock(mutex_);
  record("allocate_host");
  return make(bytes, host_);
}

void RecordingDevice::free_host(void* memory) noexcept { drop(memory, host_); }

crt::Stream RecordingDevice::create_stream() {
  const Lock lock(mutex_);
  record("create_stream");
  auto made = std::make_unique<StreamState>();
  const crt::Stream stream = made.get();
  streams_.emplace(stream, std::move(made));
  return stream;
}

void RecordingDevice::free_stream(crt::Stream stream) noexcept {
  const Lock lock(mutex_);
  streams_.erase(stream);
}

RecordingDevice::StreamState& RecordingDevice::state(crt::Stream stream) {
  const auto found = streams_.find(stream);
  if (found == streams_.end()) {
    misuse(stream == nullptr ? "work on the default stream" : "work on a stream that is gone");
  }
  return *found->second;
}

bool RecordingDevice::capturing(crt::Stream stream) {
  const Lock lock(mutex_);
  return state(stream).capturing;
}

void RecordingDevice::require_live(const void* memory, std::size_t bytes) {
  const Lock lock(mutex_);
  const auto* first = static_cast<const unsigned char*>(memory);
  auto block = device_.upper_bound(first);
  if (block == device_.begin()) {
    misuse("an address that is not the device's");
  }
  --block;
  if (first + bytes > block->first + block->second) {
    misuse("an address that is not the device's, or no longer");
  }
}

void RecordingDevice::submit(crt::Stream stream, std::function<void()> work) {
  const Lock lock(mutex_);
  StreamState& place = state(stream);
  if (place.capturing) {
    place.captured.push_back(std::move(work));
  } else {
    work();
  }
}

void RecordingDevice::synchronize(crt::Stream stream) {
  const Lock lock(mutex_);
  record("synchronize");
  if (state(stream).capturing) {
    misuse("a stream cannot be waited for while it is captured");
  }
}

void RecordingDevice::copy_to_device(void* to, const void* from, std::size_t bytes, crt::Stream stream) {
  const Lock lock(mutex_);
  record("copy_to_device");
  submit(stream, [=] {
    require_live(to, bytes);
    std::memcpy(to, from, bytes);
  });
}

void RecordingDevice::copy_to_host(void* to, const void* from, std::size_t bytes, crt::Stream stream) {
  const Lock lock(mutex_);
  record("copy_to_host");
  submit(stream, [=] {
    require_live(from, bytes);
    std::memcpy(to, from, bytes);
  });
}

void RecordingDevice::copy(void* to, const void* from, std::size_t bytes, crt::Stream stream) {
  const Lock lock(mutex_);
  record("copy");
  submit(stream, [=] {
    require_live(from, bytes);
    require_live(to, bytes);
    std::memmove(to, from, bytes);
  });
}

void RecordingDevice::fill_zero(void* memory, std::size_t pitch, std::size_t width, std::size_t height,
                                crt::Stream stream) {
  const Lock lock(mutex_);
  record("fill_zero");
  submit(stream, [=] {
    for (std::size_t line = 0; line < height; ++line) {
      unsigned char* first = static_cast<unsigned char*>(memory) + line * pitch;
      require_live(first, width);
      std::memset(first, 0, width);
    }
  });
}

void RecordingDevice::begin_capture(crt::Stream stream) {
  const Lock lock(mutex_);
  record("begin_capture");
  StreamState& place = state(stream);
  if (place.capturing) {
    misuse("the stream is already being captured");
  }
  place.capturing = true;
  place.captured.clear();
}

crt::GraphExec RecordingDevice::end_capture(crt::Stream stream) {
  const Lock lock(mutex_);
  StreamState& place = state(stream);
  place.capturing = false;
  record("end_capture");
  auto made = std::make_unique<Work>(std::move(place.captured));
  const crt::GraphExec graph = made.get();
  graphs_.emplace(graph, std::move(made));
  return graph;
}

void RecordingDevice::abandon_capture(crt::Stream stream) noexcept {
  const Lock lock(mutex_);
  ++counts_["abandon_capture"];
  const auto found = streams_.find(stream);
  if (found != streams_.end()) {
    found->second->capturing = false;
  }
}

void RecordingDevice::launch_graph(crt::GraphExec graph, crt::Stream stream) {
  const Lock lock(mutex_);
  record("launch_graph");
  const auto found = graphs_.find(graph);
  if (found == graphs_.end()) {
    misuse("a graph that is gone was launched");
  }
  for (const auto& work : *found->second) {
    submit(stream, work);
  }
}

void RecordingDevice::free_graph(crt::GraphExec graph) noexcept {
  const Lock lock(mutex_);
  graphs_.erase(graph);
}

}  // namespace crt_test
