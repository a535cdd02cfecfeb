#include "recording_engine.hpp"

#include <cstddef>
#include <cstring>
#include <exception>
#include <map>
#include <stdexcept>
#include <utility>

#include "crt_runtime/error.hpp"

namespace crt_test {

namespace {

using crt::Shape;

constexpr std::uintptr_t kAlignment = 256;

struct Place {
  void* address = nullptr;
  std::size_t bytes = 0;
  template <typename Element>
  Element* as() const {
    return static_cast<Element*>(address);
  }
};

using Places = std::map<std::string, Place>;

void compute(const Places& at, std::int64_t rows, const TinySizes& sizes) {
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t token = at.at("input_ids").as<std::int64_t>()[row];
    const std::int64_t position = at.at("position").as<std::int64_t>()[row];
    const float* state = at.at("state").as<float>() + row * sizes.hidden;
    float* next_state = at.at("next_state").as<float>() + row * sizes.hidden;
    float* cache = at.at("past_key_values.0.key").as<float>() + row * sizes.capacity;
    if (position >= 0 && position < sizes.capacity) {
      cache[position] += static_cast<float>(token) + 1.0F;  // adds: running twice is seen
    }
    float attended = 0.0F;
    for (std::int64_t i = 0; i < sizes.capacity; ++i) {
      attended += cache[i];
    }
    for (std::int64_t i = 0; i < sizes.hidden; ++i) {
      next_state[i] = 0.5F * state[i] + static_cast<float>(token) + static_cast<float>(i) + attended;
    }
    at.at("next_token").as<std::int64_t>()[row] = static_cast<std::int64_t>(next_state[0]) % 97;
    at.at("next_position").as<std::int64_t>()[row] = position + 1;
  }
}

class RecordingContext final : public crt::ExecutionContext {
 public:
  RecordingContext(RecordingEngine& engine, std::shared_ptr<RecordingDevice> device, TinySizes sizes)
      : engine_(engine), device_(std::move(device)), sizes_(sizes) {
    ++engine_.contexts;
    ++engine_.live_contexts;
  }
  ~RecordingContext() override { --engine_.live_contexts; }

  void set_input_shape(const std::string& name, const Shape& shape) override {
    ready_ = ready_ && shapes_[name] == shape;
    shapes_[name] = shape;
  }

  void set_address(const std::string& name, void* address) override {
    if (reinterpret_cast<std::uintptr_t>(address) % kAlignment != 0) {
      throw crt::Error(crt::ErrorKind::contract, "TensorRT refused the address of " + name);
    }
    ready_ = ready_ && addresses_[name] == address;
    addresses_[name] = address;
  }

  void enqueue(crt::Stream stream) override {
    if (engine_.fail_enqueue > 0 && --engine_.fail_enqueue == 0) {
      throw crt::Error(crt::ErrorKind::contract, "TensorRT did not run the engine (as the test asked)");
    }
    if (device_->capturing(stream) && !ready_) {
      throw std::logic_error("captured without a run after the last change");
    }
    ready_ = true;
    const std::int64_t rows = shapes_.at("input_ids")[0];
    Places places;
    for (const crt::EngineTensor& tensor : engine_.tensors()) {
      Shape shape = tensor.spec.dims;
      shape[0] = rows;
      std::size_t bytes = crt::size_of(tensor.spec.dtype);
      for (const std::int64_t dim : shape) {
        bytes *= static_cast<std::size_t>(dim);
      }
      places[tensor.spec.name] = Place{addresses_.at(tensor.spec.name), bytes};
    }
    device_->submit(stream, [engine = &engine_, device = device_.get(), places, rows, sizes = sizes_] {
      ++engine->runs;
      for (const crt::EngineTensor& tensor : engine->tensors()) {
        const Place& place = places.at(tensor.spec.name);
        device->require_live(place.address, place.bytes);
        if (!tensor.is_input && tensor.alias.empty()) {
          std::memset(place.address, 0xFF, place.bytes);
        }
      }
      compute(places, rows, sizes);
    });
  }

  bool capturable(crt::Stream stream) override { return stream != nullptr && engine_.capturable; }

 private:
  RecordingEngine& engine_;
  std::shared_ptr<RecordingDevice> device_;
  TinySizes sizes_;
  std::map<std::string, Shape> shapes_;
  std::map<std::string, void*> addresses_;
  bool ready_ = false;  // it has run since the last change
};

}  // namespace

RecordingEngine::RecordingEngine(std::shared_ptr<RecordingDevice> device, TinySizes sizes)
    : device_(std::move(device)), sizes_(sizes) {
  using crt::DType;
  const auto add = [this](const char* name, DType dtype, Shape rest, bool is_input, const char* alias) {
    crt::EngineTensor tensor;
    Shape dims{-1};
    dims.insert(dims.end(), rest.begin(), rest.end());
    tensor.spec = crt::TensorSpec{name, dtype, dims};
    tensor.is_input = is_input;
    if (is_input) {
      tensor.least = dims;
      tensor.least[0] = 1;
      tensor.most = dims;
      tensor.most[0] = sizes_.most_rows;
    }
    tensor.alias = alias;
    tensors_.push_back(std::move(tensor));
  };
  add("input_ids", DType::int64, {1}, true, "");
  add("next_token", DType::int64, {1}, false, "");
  add("position", DType::int64, {}, true, "");
  add("next_position", DType::int64, {}, false, "");
  add("state", DType::float32, {1, sizes.hidden}, true, "");
  add("next_state", DType::float32, {1, sizes.hidden}, false, "");
  add("past_key_values.0.key", DType::float32, {1, sizes.capacity, 1}, true, "");
  add("present_key_values.0.key", DType::float32, {1, sizes.capacity, 1}, false, "past_key_values.0.key");
}

RecordingEngine::~RecordingEngine() {
  if (live_contexts != 0) {
    std::terminate();  // TensorRT wants contexts destroyed before their engine
  }
}

std::unique_ptr<crt::ExecutionContext> RecordingEngine::create_context(bool /*captured*/) {
  return std::make_unique<RecordingContext>(*this, device_, sizes_);
}

}  // namespace crt_test
