// A GPU made of host memory: it does what it is told, keeps a record, and complains about what a real one would punish
// later or not at all (memory that is gone, the default stream, work that must not be captured).
#pragma once

#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "tensorrt/cuda_device.hpp"

namespace crt_test {

class RecordingDevice final : public crt::Device {
 public:
  RecordingDevice() = default;
  ~RecordingDevice() override;
  RecordingDevice(const RecordingDevice&) = delete;
  RecordingDevice& operator=(const RecordingDevice&) = delete;

  void make_current() override {}
  void* allocate(std::size_t bytes) override;
  void free(void* memory) noexcept override;
  void* allocate_host(std::size_t bytes) override;
  void free_host(void* memory) noexcept override;
  crt::Stream create_stream() override;
  void free_stream(crt::Stream stream) noexcept override;
  void synchronize(crt::Stream stream) override;
  void copy_to_device(void* to, const void* from, std::size_t bytes, crt::Stream stream) override;
  void copy_to_host(void* to, const void* from, std::size_t bytes, crt::Stream stream) override;
  void copy(void* to, const void* from, std::size_t bytes, crt::Stream stream) override;
  void fill_zero(void* memory, std::size_t pitch, std::size_t width, std::size_t height, crt::Stream stream) override;
  void begin_capture(crt::Stream stream) override;
  crt::GraphExec end_capture(crt::Stream stream) override;
  void abandon_capture(crt::Stream stream) noexcept override;
  void launch_graph(crt::GraphExec graph, crt::Stream stream) override;
  void free_graph(crt::GraphExec graph) noexcept override;

  /// Put work on a stream: done at once, or recorded while the stream is being captured.
  void submit(crt::Stream stream, std::function<void()> work);
  bool capturing(crt::Stream stream);
  /// Throws unless all these bytes are memory of the device that was not given back.
  void require_live(const void* memory, std::size_t bytes);
  /// Every later call of this name fails with a CUDA error; "" ends that.
  void fail_at(const std::string& call) { failing_ = call; }

  /// How often a call of this name was made.
  int count(const std::string& call);
  /// Allocations, streams and graphs that were not given back.
  std::size_t left();

 private:
  using Work = std::vector<std::function<void()>>;
  struct StreamState {
    bool capturing = false;
    Work captured;
  };

  void record(const std::string& call);
  StreamState& state(crt::Stream stream);
  void* make(std::size_t bytes, std::map<const unsigned char*, std::size_t>& sizes);
  void drop(void* memory, std::map<const unsigned char*, std::size_t>& sizes) noexcept;

  std::recursive_mutex mutex_;
  std::string failing_;
  std::map<std::string, int> counts_;
  std::map<const unsigned char*, std::size_t> device_;
  std::map<const unsigned char*, std::size_t> host_;
  std::map<crt::Stream, std::unique_ptr<StreamState>> streams_;
  std::map<crt::GraphExec, std::unique_ptr<Work>> graphs_;
};

}  // namespace crt_test
