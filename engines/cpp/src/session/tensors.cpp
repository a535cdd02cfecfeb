#include "session/tensors.hpp"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>

#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"
#include "session/prefill.hpp"

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
    half.ids = engine.allocate({sizes.batch, 1}, DType::int64);
    half.position = engine.allocate({sizes.batch}, DType::int64);
    if (sizes.recurrent) half.state = engine.allocate({sizes.batch, 1, sizes.hidden}, DType::float32);
    half.held_ids.assign(index_of(sizes.batch), kUnknown);
    half.held_positions.assign(index_of(sizes.batch), kUnknown);
  }
  logits_ = engine.allocate({sizes.batch, sizes.vocab}, DType::float32);
  if (engine.one_graph()) allocate_one_token();
  const std::vector<float> none(index_of(sizes.batch * sizes.vocab), std::numeric_limits<float>::quiet_NaN());
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
    const PrefillCall call{rows.data() + batch.start, positions + batch.start, batch.stop - batch.start, batch.seq,
                           sizes_.hidden,             sizes_.recurrent,        passes,                   bound};
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

const float* SessionTensors::state() {
  return sizes_.recurrent ? static_cast<const float*>(double_buffer_[current_].state->read()) : nullptr;
}

void SessionTensors::restore(const std::vector<const unsigned char*>& caches, std::int64_t length, const float* logits,
                             const float* state) {
  forget();
  logits_->write(logits);
  if (sizes_.recurrent) double_buffer_[current_].state->write(state);
  caches_.write(caches, length);
}

void SessionTensors::clear(const std::int64_t* positions) {
  forget();
  caches_.trim(positions);
  std::vector<float> values(logits(), logits() + sizes_.batch * sizes_.vocab);
  for (std::int64_t row = 0; row < sizes_.batch; ++row) {
    if (positions[row] == 0) {
      std::fill_n(values.begin() + row * sizes_.vocab, sizes_.vocab, std::numeric_limits<float>::quiet_NaN());
    }
  }
  logits_->write(values.data());
  if (!sizes_.recurrent) return;
  for (Half& half : double_buffer_) {
    const auto* held = static_cast<const float*>(half.state->read());
    std::vector<float> state(held, held + sizes_.batch * sizes_.hidden);
    for (std::int64_t row = 0; row < sizes_.batch; ++row) {
      if (positions[row] == 0) std::fill_n(state.begin() + row * sizes_.hidden, sizes_.hidden, 0.0F);
    }
    half.state->write(state.data());
  }
}

void SessionTensors::assign(SessionTensors& other) {
  const std::int64_t batch = sizes_.batch;
  forget();
  Half& target = double_buffer_[current_];
  Half& source = other.double_buffer_[other.current_];
  target.ids->copy_rows(*source.ids, 0, batch);
  target.position->copy_rows(*source.position, 0, batch);
  target.held_ids = source.held_ids;
  target.held_positions = source.held_positions;
  if (sizes_.recurrent) target.state->copy_rows(*source.state, 0, batch);
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
  Binding own{{names::kInputIds, BufferSlice{double_buffer_[current_].ids.get(), batch.start, batch.stop}}};
  if (one_token_.length != nullptr) {
    own.insert({{names::kLength, BufferSlice{one_token_.length.get(), batch.start, batch.stop}},
                {names::kHidden, BufferSlice{one_token_.hidden.get(), batch.start, batch.stop}},
                {names::kNextHidden, BufferSlice{one_token_.next_hidden.get(), batch.start, batch.stop}},
                {names::kResidual, BufferSlice{one_token_.residual.get(), batch.start, batch.stop}}});
  }
  const SharedSlices shared_slices = [&](const std::string& name) { return shared(name, batch); };
  std::unique_ptr<Launch> launch = bind_by_name(engine_.program(names::kGraphStep), own, shared_slices, true);
  return *step_launches_.emplace(key, std::move(launch)).first->second;
}

void SessionTensors::allocate_one_token() {
  const Shape iterate{sizes_.batch, 1, sizes_.hidden};
  one_token_.length = engine_.allocate({sizes_.batch}, DType::int64);
  one_token_.length->write(std::vector<std::int64_t>(index_of(sizes_.batch), 1).data());
  one_token_.hidden = engine_.allocate(iterate, DType::float32);
  one_token_.next_hidden = engine_.allocate(iterate, DType::float32);
  one_token_.residual = engine_.allocate({sizes_.batch}, DType::float32);
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
  std::int64_t begin = 0;
  for (const Batch& batch : batches) {
    if (sizes_.recurrent && begin < batch.start) target.state->copy_rows(*source.state, begin, batch.start);
    begin = batch.stop;
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      target.held_ids[index_of(row)] = tokens[row];
      target.held_positions[index_of(row)] =
          positions[row] + (rows == nullptr ? 1 : (*rows)[index_of(row)].count);
    }
  }
  if (sizes_.recurrent && begin < sizes_.batch) target.state->copy_rows(*source.state, begin, sizes_.batch);
  current_ = 1 - current_;
}

void SessionTensors::forget() noexcept {
  for (Half& half : double_buffer_) {
    std::fill(half.held_ids.begin(), half.held_ids.end(), kUnknown);
    std::fill(half.held_positions.begin(), half.held_positions.end(), kUnknown);
  }
}

BufferSlice SessionTensors::shared(const std::string& name, const Batch& batch) {
  Half& read = double_buffer_[current_];
  Half& written = double_buffer_[1 - current_];
  const std::map<std::string, Buffer*> buffers{
      {names::kPosition, read.position.get()},       {names::kState, read.state.get()},
      {names::kNextToken, written.ids.get()},        {names::kNextPosition, written.position.get()},
      {names::kNextState, written.state.get()},      {names::kLogits, logits_.get()}};
  const auto found = buffers.find(name);
  if (found != buffers.end() && found->second != nullptr) return BufferSlice{found->second, batch.start, batch.stop};
  const std::optional<BufferSlice> cache = caches_.rows(name, batch.start, batch.stop);
  if (cache) return *cache;
  throw Error(ErrorKind::contract, "a graph asks for a tensor '" + name + "' that the contract does not have");
}

}  // namespace crt
