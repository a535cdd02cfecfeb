#include "session/tensors.hpp"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "bundle/contract.hpp"
#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"

namespace crt {
namespace {

// A batch of n rows has n(n+1)/2 slices; only the few that recur are worth keeping.
constexpr std::size_t kMostKeptLaunches = 64;
constexpr std::int64_t kUnknown = -1;

std::size_t index_of(std::int64_t value) { return static_cast<std::size_t>(value); }

}  // namespace

SessionTensors::SessionTensors(Engine& engine, const TensorSizes& sizes, bool rows_are_independent)
    : engine_(engine), sizes_(sizes), caches_(engine, sizes, rows_are_independent) {
  for (Half& half : double_buffer_) {
    const auto allocate = [&](const std::string& name, Shape shape, DType dtype) {
      return (half.tensors[name] = engine.allocate(std::move(shape), dtype)).get();
    };
    half.ids = allocate(names::kInputIds, {sizes.batch, 1}, DType::int64);
    half.position = allocate(names::kPosition, {sizes.batch}, DType::int64);
    for (const StateSpec& state : sizes.model.states) {
      const std::string name = names::state(state.name);
      half.states.emplace_back(name, allocate(name, shape_of_tokens(sizes.batch, 1, state.shape), DType::float32));
    }
    half.held_ids.assign(index_of(sizes.batch), kUnknown);
    half.held_positions.assign(index_of(sizes.batch), kUnknown);
  }
  logits_ = engine.allocate({sizes.batch, sizes.model.vocab}, DType::float32);
  for (const auto& [output, input] : graph_contract(names::kGraphStep, sizes.model).continues) {
    continued_[output] = input;
  }
  if (engine.one_graph()) {
    one_token_ = own_tensors(engine, sizes.model, sizes.batch, 1);
    const std::vector<std::int64_t> ones(index_of(sizes.batch), 1);
    (one_token_[names::kLength] = engine.allocate({sizes.batch}, DType::int64))->write(ones.data());
  }
  const std::vector<float> none(index_of(sizes.batch * sizes.model.vocab), std::numeric_limits<float>::quiet_NaN());
  logits_->write(none.data());
}

void SessionTensors::step(const std::int64_t* ids, const std::int64_t* positions, const std::vector<Batch>& batches) {
  Half& half = double_buffer_[current_];
  feed(half.held_ids, *half.ids, ids, batches);
  feed(half.held_positions, *half.position, positions, batches);
  make_room(positions, batches);
  for (const Batch& batch : batches) step_launch(batch).run();
  finish(positions, batches, nullptr);
}

void SessionTensors::prefill(const std::vector<RowTokens>& rows, const std::int64_t* positions,
                             const std::vector<Batch>& batches, std::int64_t passes, std::optional<float> bound,
                             std::vector<float>& residual) {
  Half& half = double_buffer_[current_];
  if (passes == 0 && engine_.one_graph()) passes = sizes_.unroll;
  feed(half.held_positions, *half.position, positions, batches);
  make_room(positions, batches);
  for (const Batch& batch : batches) {
    const PrefillCall call{sizes_.model, rows.data() + batch.start, positions + batch.start,
                           batch.stop - batch.start, batch.seq, passes, bound};
    call.run(engine_, [&](const std::string& name) { return shared(name, batch); }, residual.data() + batch.start);
  }
  finish(positions, batches, &rows);
  // Leave no trace of padding: beyond the position a value that is not finite spoils later logits.
  for (const Batch& batch : batches) {
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      const std::int64_t begin = positions[row];
      caches_.clear(row, begin + rows[index_of(row)].count, begin + batch.seq);
    }
  }
}

void SessionTensors::restore(const std::vector<const unsigned char*>& caches, std::int64_t length, const float* logits,
                             const std::vector<std::vector<float>>& states) {
  forget();
  logits_->write(logits);
  for (std::size_t index = 0; index < states.size(); ++index) {
    double_buffer_[current_].states[index].second->write(states[index].data());
  }
  caches_.write(caches, length);
}

void SessionTensors::clear(const std::int64_t* positions) {
  forget();
  caches_.trim(positions);
  const auto fill_fresh = [&](Buffer& buffer, float value) {
    const auto* held = static_cast<const float*>(buffer.read());
    const std::size_t width = buffer.row_bytes() / sizeof(float);
    std::vector<float> values(held, held + width * index_of(sizes_.batch));
    for (std::int64_t row = 0; row < sizes_.batch; ++row) {
      if (positions[row] == 0) std::fill_n(values.data() + index_of(row) * width, width, value);
    }
    buffer.write(values.data());
  };
  fill_fresh(*logits_, std::numeric_limits<float>::quiet_NaN());
  for (Half& half : double_buffer_) {
    for (const auto& state : half.states) fill_fresh(*state.second, 0.0F);
  }
}

void SessionTensors::assign(SessionTensors& other) {
  const std::int64_t batch = sizes_.batch;
  forget();
  Half& target = double_buffer_[current_];
  Half& source = other.double_buffer_[other.current_];
  for (const auto& [name, buffer] : target.tensors) buffer->copy_rows(*source.tensors.at(name), 0, batch);
  target.held_ids = source.held_ids;
  target.held_positions = source.held_positions;
  logits_->copy_rows(*other.logits_, 0, batch);
  caches_.assign(other.caches_);
}

Launch& SessionTensors::step_launch(const Batch& batch) {
  if (bound_moves_ != caches_.moves()) {
    step_launches_.clear();
    bound_moves_ = caches_.moves();
  }
  const auto key = std::make_tuple(batch.start, batch.stop, current_);
  const auto found = step_launches_.find(key);
  if (found != step_launches_.end()) return *found->second;
  if (step_launches_.size() >= std::max(kMostKeptLaunches, 4 * static_cast<std::size_t>(sizes_.batch))) {
    step_launches_.clear();
  }
  Binding own;
  for (const auto& [name, buffer] : one_token_) own[name] = BufferSlice{buffer.get(), batch.start, batch.stop};
  const SharedSlices shared_slices = [&](const std::string& name) { return shared(name, batch); };
  std::unique_ptr<Launch> launch = bind_by_name(engine_.program(names::kGraphStep), own, shared_slices, true);
  return *step_launches_.emplace(key, std::move(launch)).first->second;
}

/// Let the caches grow to what the batches write, padding included.
void SessionTensors::make_room(const std::int64_t* positions, const std::vector<Batch>& batches) {
  for (const Batch& batch : batches) {
    const std::int64_t tokens = *std::max_element(positions + batch.start, positions + batch.stop) + batch.seq;
    caches_.reserve(batch.start, batch.stop, tokens);
  }
}

/// Upload what the rows of the batches need, unless the last launch left exactly that there.
void SessionTensors::feed(std::vector<std::int64_t>& held, Buffer& buffer, const std::int64_t* values,
                          const std::vector<Batch>& batches) {
  bool same = true;
  for (const Batch& batch : batches) {
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      same = same && held[index_of(row)] == values[row];
      held[index_of(row)] = values[row];
    }
  }
  if (!same) buffer.write(held.data());
}

/// Make the written set the current one, after carrying over the rows that did not run.
void SessionTensors::finish(const std::int64_t* positions, const std::vector<Batch>& batches,
                            const std::vector<RowTokens>* rows) {
  Half& source = double_buffer_[current_];
  Half& target = double_buffer_[1 - current_];
  const auto* tokens = static_cast<const std::int64_t*>(target.ids->read());
  const auto carry = [&](std::int64_t begin, std::int64_t end) {
    for (std::size_t index = 0; begin < end && index < source.states.size(); ++index) {
      target.states[index].second->copy_rows(*source.states[index].second, begin, end);
    }
  };
  std::int64_t begin = 0;
  for (const Batch& batch : batches) {
    carry(begin, batch.start);
    begin = batch.stop;
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      target.held_ids[index_of(row)] = tokens[row];
      target.held_positions[index_of(row)] =
          positions[row] + (rows == nullptr ? 1 : (*rows)[index_of(row)].count);
    }
  }
  carry(begin, sizes_.batch);
  current_ = 1 - current_;
}

void SessionTensors::forget() noexcept {
  for (Half& half : double_buffer_) {
    std::fill(half.held_ids.begin(), half.held_ids.end(), kUnknown);
    std::fill(half.held_positions.begin(), half.held_positions.end(), kUnknown);
  }
}

BufferSlice SessionTensors::shared(const std::string& name, const Batch& batch) {
  if (name == names::kLogits) return BufferSlice{logits_.get(), batch.start, batch.stop};
  const auto continued = continued_.find(name);
  const bool written = continued != continued_.end();
  const Half& half = double_buffer_[written ? 1 - current_ : current_];
  const auto found = half.tensors.find(written ? continued->second : name);
  if (found != half.tensors.end()) return BufferSlice{found->second.get(), batch.start, batch.stop};
  const std::optional<BufferSlice> cache = caches_.rows(name, batch.start, batch.stop);
  if (cache) return *cache;
  throw Error(ErrorKind::contract, "a graph asks for a tensor '" + name + "' that the contract does not have");
}

}  // namespace crt
