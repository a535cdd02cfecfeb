#include "toy_engine.hpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <utility>

#include "crt_runtime/error.hpp"
#include "engine/engine.hpp"
#include "engine/tensor_names.hpp"

namespace crt_test {

namespace {

using crt::Binding;
using crt::Buffer;
using crt::DType;
using crt::BufferSlice;
using crt::Shape;
using crt::TensorSpec;

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Host memory that counts the uploads of ids, positions and lengths.
class CountedBuffer final : public Buffer {
 public:
  CountedBuffer(Shape shape, DType dtype, std::shared_ptr<ToyControl> control)
      : Buffer(shape, dtype), memory_(std::move(shape), dtype), control_(std::move(control)) {}
  void* address() noexcept override { return memory_.address(); }
  const void* read() override { return memory_.read(); }
  void write(const void* values) override {
    control_->writes += dtype() == DType::int64 ? 1 : 0;
    memory_.write(values);
  }
  void copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) override {
    memory_.copy_rows(source, begin, end);
  }
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end) override { memory_.clear(row, begin, end); }

 private:
  crt::HostBuffer memory_;
  std::shared_ptr<ToyControl> control_;
};

std::int64_t chosen_token(double keys, double state) {
  return static_cast<std::int64_t>(keys + std::floor(state)) % kToyVocab;
}

class ToyLaunch final : public crt::Launch {
 public:
  ToyLaunch(std::string graph, Binding inputs, Binding outputs, std::shared_ptr<ToyControl> control)
      : graph_(std::move(graph)),
        inputs_(std::move(inputs)),
        outputs_(std::move(outputs)),
        control_(std::move(control)) {}

  void run() override {
    ++control_->runs;
    control_->passes += graph_ == crt::names::kGraphPrefillPass ? 1 : 0;
    if (control_->failing) {
      throw crt::Error(crt::ErrorKind::contract, "the toy engine was told to fail");
    }
    const Shape ids = inputs_.at(crt::names::kInputIds).shape();
    for (std::int64_t row = 0; row < ids[0]; ++row) {
      run_row(row, ids[1]);
    }
  }

 private:
  template <typename Value>
  Value* row_of(const Binding& binding, const std::string& name, std::int64_t row) const {
    const BufferSlice& rows = binding.at(name);
    const std::size_t width = rows.buffer->row_bytes() / sizeof(Value);
    return static_cast<Value*>(rows.address()) + width * static_cast<std::size_t>(row);
  }

  void run_row(std::int64_t row, std::int64_t seq) const {
    const bool step = graph_ == crt::names::kGraphStep;
    const auto* ids = row_of<const std::int64_t>(inputs_, crt::names::kInputIds, row);
    const std::int64_t position = *row_of<const std::int64_t>(inputs_, crt::names::kPosition, row);
    const std::int64_t length = step ? 1 : *row_of<const std::int64_t>(inputs_, crt::names::kLength, row);
    auto* key = row_of<float>(outputs_, crt::names::present_key_values_key(0), row);
    auto* value = row_of<float>(outputs_, crt::names::present_key_values_value(0), row);
    double state = *row_of<const float>(inputs_, crt::names::state(control_->state), row);
    bool spoiled = false;
    for (std::int64_t index = 0; index < seq; ++index) {
      const std::int64_t at = 2 * (position + index);
      const auto token = static_cast<float>(ids[index]);
      const bool real = index < length;
      key[at] = value[at] = real ? token + 1.0F : kNaN;
      key[at + 1] = real ? static_cast<float>(position + index) : kNaN;
      value[at + 1] = real ? token : kNaN;
      state = real ? 0.5 * state + token + 1.0 : state;
      state = real && ids[index] == control_->overflowing ? HUGE_VAL : state;
      for (std::int64_t channel = 0; !step && channel < kToyHidden; ++channel) {
        row_of<float>(outputs_, crt::names::next_iterate(control_->state), row)[index * kToyHidden + channel] =
            static_cast<float>(state);
      }
      spoiled = spoiled || (real && ids[index] == control_->spoiled_logits);
    }
    double sum = 0.0;
    for (std::int64_t at = 0; at < position + length; ++at) {
      sum += static_cast<double>(key[2 * at]);
    }
    const std::int64_t chosen = std::isfinite(state) ? chosen_token(sum, state) : 0;
    auto* logits = row_of<float>(outputs_, crt::names::kLogits, row);
    for (std::int64_t token = 0; token < kToyVocab; ++token) {
      logits[token] = -static_cast<float>(std::abs(token - chosen));
    }
    logits[0] = spoiled ? kNaN : logits[0];
    for (std::int64_t channel = 0; channel < kToyHidden; ++channel) {
      row_of<float>(outputs_, crt::names::next_state(control_->state), row)[channel] = static_cast<float>(state);
    }
    *row_of<std::int64_t>(outputs_, crt::names::kNextToken, row) = chosen;
    *row_of<std::int64_t>(outputs_, crt::names::kNextPosition, row) = position + length;
    if (!step) {
      std::deque<float>& residuals = control_->residuals;
      *row_of<float>(outputs_, crt::names::kResidual, row) = residuals.empty() ? 0.0F : residuals.front();
      if (!residuals.empty()) {
        residuals.pop_front();
      }
    }
  }

  std::string graph_;
  Binding inputs_;
  Binding outputs_;
  std::shared_ptr<ToyControl> control_;
};

class ToyProgram final : public crt::Program {
 public:
  ToyProgram(std::string graph, std::shared_ptr<ToyControl> control)
      : graph_(std::move(graph)), control_(std::move(control)) {
    const Shape cache{-1, 1, -1, 2};
    const Shape state{-1, 1, kToyHidden};
    inputs_ = {{crt::names::kInputIds, DType::int64, {-1, -1}},
               {crt::names::kPosition, DType::int64, {-1}},
               {crt::names::state(control_->state), DType::float32, state},
               {crt::names::past_key_values_key(0), DType::float32, cache},
               {crt::names::past_key_values_value(0), DType::float32, cache}};
    outputs_ = {{crt::names::kLogits, DType::float32, {-1, kToyVocab}},
                {crt::names::kNextToken, DType::int64, {-1, 1}},
                {crt::names::kNextPosition, DType::int64, {-1}},
                {crt::names::next_state(control_->state), DType::float32, state},
                {crt::names::present_key_values_key(0), DType::float32, cache},
                {crt::names::present_key_values_value(0), DType::float32, cache}};
    if (graph_ != crt::names::kGraphStep) {
      inputs_.push_back({crt::names::kLength, DType::int64, {-1}});
      inputs_.push_back({crt::names::iterate(control_->state), DType::float32, {-1, -1, kToyHidden}});
      outputs_.push_back({crt::names::next_iterate(control_->state), DType::float32, {-1, -1, kToyHidden}});
      if (control_->state != crt::names::kHidden) {
        outputs_.push_back({crt::names::kNextHidden, DType::float32, {-1, -1, kToyHidden}});
      }
      outputs_.push_back({crt::names::kResidual, DType::float32, {-1}});
    }
  }

  const std::vector<TensorSpec>& inputs() const noexcept override { return inputs_; }
  const std::vector<TensorSpec>& outputs() const noexcept override { return outputs_; }
  std::unique_ptr<crt::Launch> bind(const Binding& inputs, const Binding& outputs, bool) override {
    return std::make_unique<ToyLaunch>(graph_, inputs, outputs, control_);
  }

 private:
  std::string graph_;
  std::shared_ptr<ToyControl> control_;
  std::vector<TensorSpec> inputs_;
  std::vector<TensorSpec> outputs_;
};

class ToyEngine final : public crt::Engine {
 public:
  explicit ToyEngine(std::shared_ptr<ToyControl> control) : control_(std::move(control)) {
    for (const char* graph : {crt::names::kGraphStep, crt::names::kGraphPrefill, crt::names::kGraphPrefillPass}) {
      programs_.emplace(graph, std::make_unique<ToyProgram>(graph, control_));
    }
  }
  std::int64_t max_tokens() const noexcept override { return control_->max_tokens; }
  std::optional<std::int64_t> max_batch() const noexcept override { return std::nullopt; }
  std::optional<std::int64_t> fixed_capacity() const noexcept override { return std::nullopt; }
  bool host_memory() const noexcept override { return control_->host_memory; }
  bool one_graph() const noexcept override { return control_->one_graph; }
  crt::Program& program(const std::string& graph) override {
    if (one_graph() && graph == crt::names::kGraphPrefill) {
      throw crt::Error(crt::ErrorKind::unsupported, "the toy has one graph");
    }
    return *programs_.at(one_graph() ? crt::names::kGraphPrefillPass : graph);
  }
  std::unique_ptr<Buffer> allocate(Shape shape, DType dtype) override {
    return std::make_unique<CountedBuffer>(std::move(shape), dtype, control_);
  }

 private:
  std::shared_ptr<ToyControl> control_;
  std::map<std::string, std::unique_ptr<ToyProgram>> programs_;
};

}  // namespace

std::shared_ptr<crt::Engine> make_toy_engine(std::shared_ptr<ToyControl> control) {
  return std::make_shared<ToyEngine>(std::move(control));
}

crt::SessionSetup toy_setup(std::int64_t batch, std::int64_t capacity) {
  crt::SessionSetup setup;
  setup.target = "toy";
  setup.bundle = std::string(64, '0');
  setup.sizes.batch = batch;
  setup.sizes.capacity = capacity;
  crt::ModelConfig& model = setup.sizes.model;
  model.vocab = kToyVocab;
  model.hidden = kToyHidden;
  model.states = {{"hidden", {kToyHidden}}};
  model.rotaries = {{true, {1.0}}};
  model.caches = {{"0", 1, 2, {}, 0}};
  model.iterated = true;
  return setup;
}

std::vector<float> floats_of(const std::vector<unsigned char>& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}

void ToyRow::feed(const std::vector<std::int64_t>& tokens) {
  for (const std::int64_t token : tokens) {
    keys.push_back(static_cast<double>(token) + 1.0);
    state = 0.5 * state + static_cast<double>(token) + 1.0;
  }
}

std::int64_t ToyRow::next_token() const {
  double sum = 0.0;
  for (const double key : keys) {
    sum += key;
  }
  return chosen_token(sum, state);
}

}  // namespace crt_test
