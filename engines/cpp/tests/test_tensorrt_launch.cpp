// Launches of a TensorRT engine on a recording device: captured steps, plain prefills, failures, moved buffers.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tensorrt/tensorrt_launch.hpp"
#include "tiny_session.hpp"

namespace {

using crt_test::put;
using crt_test::refused;
using crt_test::TinyRow;
using crt_test::TinySession;
using crt_test::values_of;

/// A buffer that can move, as none of the library's does: what CapturedLaunch must notice all the same.
class MovableBuffer final : public crt::Buffer {
 public:
  explicit MovableBuffer(std::unique_ptr<crt::DeviceBuffer> inner)
      : Buffer(inner->shape(), inner->dtype()), inner_(std::move(inner)) {}
  void* address() noexcept override { return inner_->address(); }
  const void* read() override { return inner_->read(); }
  void write(const void* values) override { inner_->write(values); }
  void copy_rows(crt::Buffer& source, std::int64_t begin, std::int64_t end) override {
    inner_->copy_rows(source, begin, end);
  }
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end) override { inner_->clear(row, begin, end); }
  void move_to(std::unique_ptr<crt::DeviceBuffer> place) {
    place->write(inner_->read());
    inner_ = std::move(place);
  }

 private:
  std::unique_ptr<crt::DeviceBuffer> inner_;
};

}  // namespace

TEST_CASE("tensorrt launch: captured steps with two parities compute what the host does, without an upload") {
  TinySession session(2);
  put<std::int64_t>(*session.ids[0], {3, 5});
  const std::array<std::unique_ptr<crt::Launch>, 2> launches{session.bind(0, 2, 0), session.bind(0, 2, 1)};
  std::vector<TinyRow> rows{TinyRow(3), TinyRow(5)};
  const int uploads = session.device->count("copy_to_device");
  const int allocations = session.device->count("allocate") + session.device->count("allocate_host");
  const int runs = session.engine->runs;
  for (std::size_t step = 0; step < 7; ++step) {
    launches[step % 2]->run();
    for (TinyRow& row : rows) {
      row.step();
    }
  }
  CHECK(session.engine->runs - runs == 7);
  CHECK(session.device->count("launch_graph") == 7);
  CHECK(session.device->count("copy_to_device") == uploads);
  CHECK(session.device->count("allocate") + session.device->count("allocate_host") == allocations);
  CHECK(values_of<std::int64_t>(*session.ids[1]) == std::vector<std::int64_t>{rows[0].token, rows[1].token});
  CHECK(values_of<std::int64_t>(*session.position[1]) == std::vector<std::int64_t>{7, 7});
  std::vector<float> state = rows[0].state;
  state.insert(state.end(), rows[1].state.begin(), rows[1].state.end());
  CHECK(values_of<float>(*session.state[1]) == state);
  std::vector<float> cache = rows[0].cache;
  cache.insert(cache.end(), rows[1].cache.begin(), rows[1].cache.end());
  CHECK(values_of<float>(*session.cache) == cache);
}

TEST_CASE("tensorrt launch: binding runs the engine and leaves no trace") {
  TinySession session(2);
  put<std::int64_t>(*session.ids[0], {3, 5});
  put<std::int64_t>(*session.ids[1], {11, 12});
  put<std::int64_t>(*session.position[1], {13, 14});
  put<float>(*session.state[1], std::vector<float>(10, 0.25F));
  put<float>(*session.cache, std::vector<float>(14, 1.5F));
  const auto launch = session.bind(0, 2, 0);
  CHECK(session.engine->runs == 1);  // the warm-up
  CHECK(session.engine->warmed == 1);
  CHECK(values_of<std::int64_t>(*session.ids[1]) == std::vector<std::int64_t>{11, 12});
  CHECK(values_of<std::int64_t>(*session.position[1]) == std::vector<std::int64_t>{13, 14});
  CHECK(values_of<float>(*session.state[1]) == std::vector<float>(10, 0.25F));
  CHECK(values_of<float>(*session.cache) == std::vector<float>(14, 1.5F));
}

TEST_CASE("tensorrt launch: rows in the middle of a batch go through staging, their neighbours stay") {
  for (const bool repeated : {true, false}) {
    CAPTURE(repeated);
    TinySession session(3);
    put<std::int64_t>(*session.ids[0], {3, 5, 9});
    put<float>(*session.cache, std::vector<float>(21, 2.0F));
    const auto launch = session.bind(1, 2, 0, repeated);
    put<std::int64_t>(*session.ids[0], {3, 6, 9});  // after binding: the launch takes what is there when it runs
    launch->run();
    TinyRow row(6);
    row.cache.assign(7, 2.0F);
    row.step();
    CHECK(values_of<std::int64_t>(*session.ids[1]) == std::vector<std::int64_t>{0, row.token, 0});
    std::vector<float> cache(21, 2.0F);
    std::copy(row.cache.begin(), row.cache.end(), cache.begin() + 7);
    CHECK(values_of<float>(*session.cache) == cache);
    std::vector<float> state(15, 0.0F);
    std::copy(row.state.begin(), row.state.end(), state.begin() + 5);
    CHECK(values_of<float>(*session.state[1]) == state);
  }
}

TEST_CASE("tensorrt launch: a moved buffer is noticed and the graph captured again") {
  TinySession session(1);
  put<std::int64_t>(*session.ids[0], {4});
  MovableBuffer cache(session.allocate({1, 1, 7, 1}, crt::DType::float32));
  crt::Binding inputs = session.inputs(0, 1, 0);
  crt::Binding outputs = session.outputs(0, 1, 0);
  inputs["past_key_values.0.key"].buffer = &cache;
  outputs["present_key_values.0.key"].buffer = &cache;
  const auto launch = session.program->bind(inputs, outputs, true);
  launch->run();
  launch->run();
  CHECK(session.device->count("begin_capture") == 1);
  cache.move_to(session.allocate({1, 1, 7, 1}, crt::DType::float32));  // the old memory is gone: using it throws
  launch->run();
  CHECK(session.device->count("begin_capture") == 2);
  CHECK(session.engine->contexts == 1);
  CHECK(values_of<float>(cache) == std::vector<float>{15, 0, 0, 0, 0, 0, 0});  // three runs of token 4 at position 0
}

TEST_CASE("tensorrt launch: every captured graph has a context of its own, and a retired one is used again") {
  TinySession session(2);
  auto first = session.bind(0, 2, 0);
  auto second = session.bind(0, 2, 1);
  CHECK(session.engine->contexts == 2);
  first.reset();
  CHECK(session.engine->live_contexts == 2);
  first = session.bind(0, 1, 0);
  CHECK(session.engine->contexts == 2);
  CHECK(session.engine->warmed == 2);
  put<std::int64_t>(*session.ids[0], {7, 8});
  first->run();
  TinyRow row(7);
  row.step();
  CHECK(values_of<std::int64_t>(*session.ids[1]) == std::vector<std::int64_t>{row.token, 0});
}

TEST_CASE("tensorrt launch: prefills in turn share one context, prefills at the same time do not") {
  TinySession session(4);
  for (std::int64_t rows = 1; rows <= 4; ++rows) {
    session.bind(0, rows, 0, false)->run();
  }
  CHECK(session.engine->contexts == 1);
  CHECK(session.device->count("begin_capture") == 0);

  std::vector<std::unique_ptr<crt::Launch>> launches;
  for (std::int64_t row = 0; row < 4; ++row) {
    launches.push_back(session.bind(row, row + 1, 0, false));
  }
  std::vector<std::thread> threads;
  for (const auto& launch : launches) {
    threads.emplace_back([&launch] {
      for (int repetition = 0; repetition < 20; ++repetition) {
        launch->run();
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(session.engine->contexts <= 4);
  // Four rows of token 0 at position 0: the cache of each was added to in every run, and by nobody else.
  const float first = 24.0F;  // row 0 ran four times before
  CHECK(values_of<float>(*session.cache)[0] == first);
  CHECK(values_of<float>(*session.cache)[7] == 23.0F);
  CHECK(values_of<float>(*session.cache)[14] == 22.0F);
  CHECK(values_of<float>(*session.cache)[21] == 21.0F);
}

TEST_CASE("tensorrt launch: an engine that fails while it warms up leaves the caches as they were") {
  TinySession session(1);
  put<float>(*session.cache, std::vector<float>(7, 1.0F));
  session.engine->fail_enqueue = 1;
  CHECK(refused([&] { session.bind(0, 1, 0); }).find("TensorRT did not run the engine") != std::string::npos);
  CHECK(values_of<float>(*session.cache) == std::vector<float>(7, 1.0F));
  CHECK(session.engine->live_contexts == 0);  // what the context holds is unknown: it is not used again
  session.device->fail_at("synchronize");  // now it runs, and then the wait for it fails
  CHECK(refused([&] { session.bind(0, 1, 0); }).find("synchronize failed") != std::string::npos);
  session.device->fail_at("");
  CHECK(session.engine->runs == 1);
  CHECK(values_of<float>(*session.cache) == std::vector<float>(7, 1.0F));
  const auto launch = session.bind(0, 1, 0);
  launch->run();
  CHECK(values_of<float>(*session.cache)[0] == 2.0F);
}

TEST_CASE("tensorrt launch: a failure while capturing ends the capture") {
  TinySession session(1);
  session.engine->fail_enqueue = 2;
  CHECK(refused([&] { session.bind(0, 1, 0); }).find("as the test asked") != std::string::npos);
  CHECK(session.device->count("abandon_capture") == 1);
  session.device->fail_at("end_capture");
  CHECK(refused([&] { session.bind(0, 1, 0); }).find("end_capture failed with cudaErrorMadeUp") != std::string::npos);
  session.device->fail_at("");
  session.bind(0, 1, 0)->run();
  CHECK(values_of<float>(*session.cache)[0] == 1.0F);
}

TEST_CASE("tensorrt launch: after a failed launch the graph is captured anew") {
  TinySession session(1);
  const auto launch = session.bind(0, 1, 0);
  session.device->fail_at("launch_graph");
  CHECK(refused([&] { launch->run(); }).find("launch_graph failed with cudaErrorMadeUp") != std::string::npos);
  session.device->fail_at("");
  launch->run();
  CHECK(session.device->count("begin_capture") == 2);
  CHECK(values_of<float>(*session.cache)[0] == 1.0F);
}

TEST_CASE("tensorrt launch: an engine that cannot be captured is refused") {
  TinySession session(1);
  session.engine->capturable = false;
  CHECK(refused([&] { session.bind(0, 1, 0); }).find("cannot be captured into a CUDA graph") != std::string::npos);
}

TEST_CASE("tensorrt launch: nothing is left behind") {
  std::shared_ptr<crt_test::RecordingDevice> device;
  std::unique_ptr<crt::Launch> launch;
  {
    TinySession session(3);
    device = session.device;
    session.bind(1, 3, 0)->run();
    session.bind(1, 3, 1, false)->run();
    launch = session.bind(0, 1, 0);
  }
  launch.reset();  // the last to know the engine
  CHECK(device->left() == 0);
  CHECK(device->count("bad free") == 0);
}
