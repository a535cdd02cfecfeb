// A tiny recurrent graph that "TensorRT" has loaded onto a RecordingDevice: it computes on the host, with the shapes and
// addresses that its context had when it was enqueued, as a captured CUDA graph does.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "recording_device.hpp"
#include "tensorrt/tensorrt_engine.hpp"

namespace crt_test {

struct TinySizes {
  std::int64_t most_rows = 4;
  std::int64_t hidden = 5;    // a row of the state is 20 bytes: rows in the middle of a batch are not aligned
  std::int64_t capacity = 7;  // likewise for the cache
};

/// Tensors as in a step: input_ids, position, state and one cache in; next_token, next_position, next_state and the
/// cache out. Before a run every output that is not updated in place is filled with NaN or -1, and the cache is added
/// to, so that a run too many or an output not written shows.
class RecordingEngine final : public crt::LoadedEngine {
 public:
  RecordingEngine(std::shared_ptr<RecordingDevice> device, TinySizes sizes = {});
  ~RecordingEngine() override;
  RecordingEngine(const RecordingEngine&) = delete;
  RecordingEngine& operator=(const RecordingEngine&) = delete;

  const std::string& label() const noexcept override { return label_; }
  const std::vector<crt::EngineTensor>& tensors() const noexcept override { return tensors_; }
  std::unique_ptr<crt::ExecutionContext> create_context(bool captured) override;
  void warmed_up() noexcept override { ++warmed; }

  std::vector<crt::EngineTensor>& edit() { return tensors_; }

  std::atomic<int> contexts{0};       // made
  std::atomic<int> live_contexts{0};  // not destroyed
  std::atomic<int> runs{0};           // that computed, not that were captured
  std::atomic<int> warmed{0};
  std::atomic<int> fail_enqueue{0};   // the how-many-th enqueue from now fails; 0 none
  bool capturable = true;

 private:
  std::shared_ptr<RecordingDevice> device_;
  std::string label_ = "tiny step";
  TinySizes sizes_;
  std::vector<crt::EngineTensor> tensors_;
};

}  // namespace crt_test
