#include "session/tensors.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"

namespace crt {

namespace {

// A batch of n rows has n(n+1)/2 slices; only the few that recur are worth keeping.
constexpr std::size_t kMostKeptLaunches = 64;
constexpr std::int64_t kUnknown = -1;

Rows whole(Buffer& buffer) { return Rows{&buffer, 0, buffer.shape()[0]}; }

std::size_t index_of(std::int64_t value) { return static_cast<std::size_t>(value); }

/// Tensors that exist for one prefill call of one group only.
struct PrefillTensors {
  std::unique_ptr<Buffer> ids;
  std::unique_ptr<Buffer> length;
  std::array<std::unique_ptr<Buffer>, 2> hidden;  // each pass reads one and writes the other
  std::unique_ptr<Buffer> residual;

  PrefillTensors(Engine& engine, const TensorSizes& sizes, const Group& group) {
    const std::int64_t count = group.stop - group.start;
    ids = engine.allocate({count, group.seq}, DType::int64);
    length = engine.allocate({count}, DType::int64);
    for (std::unique_ptr<Buffer>& iterate : hidden) {
      iterate = engine.allocate({count, group.seq, sizes.hidden}, DType::float32);
    }
    residual = engine.allocate({count}, DType::float32);
  }

  void feed(const std::vector<TokenSpan>& rows, const Group& group) const {
    const std::int64_t count = group.stop - group.start;
    std::vector<std::int64_t> padded(index_of(count * group.seq), 0);
    std::vector<std::int64_t> lengths(index_of(count), 0);
    for (std::int64_t row = 0; row < count; ++row) {
      const TokenSpan& span = rows[index_of(group.start + row)];
      std::copy_n(span.tokens, span.count, padded.begin() + row * group.seq);
      lengths[index_of(row)] = span.count;
    }
    ids->write(padded.data());
    length->write(lengths.data());
  }

  /// What the pass of this parity binds; names that a graph lacks are never asked for.
  std::map<std::string, Rows> binding(std::size_t parity) const {
    return {{names::kInputIds, whole(*ids)},
            {names::kLength, whole(*length)},
            {names::kHidden, whole(*hidden[parity])},
            {names::kNextHidden, whole(*hidden[1 - parity])},
            {names::kResidual, whole(*residual)}};
  }
};

}  // namespace

SessionTensors::SessionTensors(Engine& engine, const TensorSizes& sizes) : engine_(engine), sizes_(sizes) {
  for (Set& set : sets_) {
    set.ids = engine.allocate({sizes.batch, 1}, DType::int64);
    set.position = engine.allocate({sizes.batch}, DType::int64);
    if (sizes.recurrent) {
      set.state = engine.allocate({sizes.batch, 1, sizes.hidden}, DType::float32);
    }
    set.held_ids.assign(index_of(sizes.batch), kUnknown);
    set.held_positions.assign(index_of(sizes.batch), kUnknown);
  }
  logits_ = engine.allocate({sizes.batch, sizes.vocab}, DType::float32);
  const Shape cache{sizes.batch, sizes.heads, sizes.capacity, sizes.cache_head_dim};
  for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
    caches_.push_back({engine.allocate(cache, sizes.cache_dtype), engine.allocate(cache, sizes.cache_dtype)});
  }
  const std::vector<float> none(index_of(sizes.batch * sizes.vocab), std::numeric_limits<float>::quiet_NaN());
  logits_->write(none.data());
}

void SessionTensors::step(const std::int64_t* ids, const std::int64_t* positions, const std::vector<Group>& groups) {
  Set& set = sets_[current_];
  feed(set.held_ids, *set.ids, ids, groups);
  feed(set.held_positions, *set.position, positions, groups);
  for (const Group& group : groups) {
    step_launch(group).run();
  }
  finish(positions, groups, nullptr);
}

void SessionTensors::prefill(const std::vector<TokenSpan>& rows, const std::int64_t* positions,
                             const std::vector<Group>& groups, std::int64_t passes, std::vector<float>& residual) {
  Set& set = sets_[current_];
  feed(set.held_positions, *set.position, positions, groups);
  for (const Group& group : groups) {
    prefill_group(rows, group, passes, residual);
  }
  finish(positions, groups, &rows);
  // Leave no trace of padding: beyond the position a value that is not finite spoils later logits.
  for (const Group& group : groups) {
    for (std::int64_t row = group.start; row < group.stop; ++row) {
      const std::int64_t begin = positions[row];
      clear_caches(row, begin + rows[index_of(row)].count, begin + group.seq);
    }
  }
}

void SessionTensors::prefill_group(const std::vector<TokenSpan>& rows, const Group& group, std::int64_t passes,
                                   std::vector<float>& residual) {
  Program& program = engine_.program(passes == 0 ? names::kGraphPrefill : names::kGraphPrefillPass);
  const PrefillTensors own(engine_, sizes_, group);
  own.feed(rows, group);
  std::array<std::unique_ptr<Launch>, 2> launches;
  for (std::int64_t pass = 0; pass < std::max<std::int64_t>(passes, 1); ++pass) {
    const std::size_t parity = index_of(pass % 2);
    if (launches[parity] == nullptr) {
      launches[parity] = bind(program, group, own.binding(parity), false);
    }
    launches[parity]->run();
  }
  if (sizes_.recurrent) {
    const auto* values = static_cast<const float*>(own.residual->read());
    std::copy_n(values, group.stop - group.start, residual.begin() + group.start);
  }
}

const float* SessionTensors::state() {
  return sizes_.recurrent ? static_cast<const float*>(sets_[current_].state->read()) : nullptr;
}

void SessionTensors::restore(const std::vector<const unsigned char*>& caches, std::int64_t length, const float* logits,
                             const float* state) {
  forget();
  logits_->write(logits);
  if (sizes_.recurrent) {
    sets_[current_].state->write(state);
  }
  const std::size_t token_bytes = index_of(sizes_.cache_head_dim) * size_of(sizes_.cache_dtype);
  const std::size_t given = index_of(length) * token_bytes;
  const std::size_t whole_head = index_of(sizes_.capacity) * token_bytes;
  std::vector<unsigned char> values(caches_.front().key->bytes(), 0);
  for (std::size_t index = 0; index < caches.size(); ++index) {
    for (std::size_t head = 0; given > 0 && head < index_of(sizes_.batch * sizes_.heads); ++head) {
      std::memcpy(values.data() + head * whole_head, caches[index] + head * given, given);
    }
    LayerCache& cache = caches_[index / 2];
    (index % 2 == 0 ? cache.key : cache.value)->write(values.data());
  }
}

std::vector<unsigned char> SessionTensors::entries(Buffer& cache, std::int64_t length) {
  const std::size_t heads = index_of(cache.shape()[0] * cache.shape()[1]);
  const std::size_t token_bytes = index_of(cache.shape()[3]) * size_of(cache.dtype());
  const std::size_t wanted = index_of(length) * token_bytes;
  const std::size_t whole_head = index_of(cache.shape()[2]) * token_bytes;
  std::vector<unsigned char> values(heads * wanted);
  const auto* content = static_cast<const unsigned char*>(cache.read());
  for (std::size_t head = 0; wanted > 0 && head < heads; ++head) {
    std::memcpy(values.data() + head * wanted, content + head * whole_head, wanted);
  }
  return values;
}

void SessionTensors::clear(const std::int64_t* positions) {
  forget();
  std::vector<float> values(logits(), logits() + sizes_.batch * sizes_.vocab);
  for (std::int64_t row = 0; row < sizes_.batch; ++row) {
    clear_caches(row, positions[row], sizes_.capacity);
    if (positions[row] == 0) {
      std::fill_n(values.begin() + row * sizes_.vocab, sizes_.vocab, std::numeric_limits<float>::quiet_NaN());
    }
  }
  logits_->write(values.data());
  if (!sizes_.recurrent) {
    return;
  }
  for (Set& set : sets_) {
    const auto* held = static_cast<const float*>(set.state->read());
    std::vector<float> state(held, held + sizes_.batch * sizes_.hidden);
    for (std::int64_t row = 0; row < sizes_.batch; ++row) {
      if (positions[row] == 0) {
        std::fill_n(state.begin() + row * sizes_.hidden, sizes_.hidden, 0.0F);
      }
    }
    set.state->write(state.data());
  }
}

void SessionTensors::assign(SessionTensors& other) {
  const std::int64_t batch = sizes_.batch;
  forget();
  Set& target = sets_[current_];
  Set& source = other.sets_[other.current_];
  target.ids->copy_rows(*source.ids, 0, batch);
  target.position->copy_rows(*source.position, 0, batch);
  target.held_ids = source.held_ids;
  target.held_positions = source.held_positions;
  if (sizes_.recurrent) {
    target.state->copy_rows(*source.state, 0, batch);
  }
  logits_->copy_rows(*other.logits_, 0, batch);
  for (std::size_t layer = 0; layer < caches_.size(); ++layer) {
    caches_[layer].key->copy_rows(*other.caches_[layer].key, 0, batch);
    caches_[layer].value->copy_rows(*other.caches_[layer].value, 0, batch);
  }
}

Launch& SessionTensors::step_launch(const Group& group) {
  const auto key = std::make_tuple(group.start, group.stop, current_);
  const auto found = step_launches_.find(key);
  if (found != step_launches_.end()) {
    return *found->second;
  }
  if (step_launches_.size() >= std::max(kMostKeptLaunches, 4 * static_cast<std::size_t>(sizes_.batch))) {
    step_launches_.clear();
  }
  const OwnTensors own{{names::kInputIds, Rows{sets_[current_].ids.get(), group.start, group.stop}}};
  return *step_launches_.emplace(key, bind(engine_.program(names::kGraphStep), group, own, true)).first->second;
}

/// Upload what the rows of the groups need, unless the last launch left exactly that there.
void SessionTensors::feed(std::vector<std::int64_t>& held, Buffer& buffer, const std::int64_t* values,
                          const std::vector<Group>& groups) {
  bool same = true;
  for (const Group& group : groups) {
    for (std::int64_t row = group.start; row < group.stop; ++row) {
      same = same && held[index_of(row)] == values[row];
      held[index_of(row)] = values[row];
    }
  }
  if (!same) {
    buffer.write(held.data());
  }
}

/// Make the written set the current one, after carrying over the rows that did not run.
void SessionTensors::finish(const std::int64_t* positions, const std::vector<Group>& groups,
                            const std::vector<TokenSpan>* rows) {
  Set& source = sets_[current_];
  Set& target = sets_[1 - current_];
  const auto* tokens = static_cast<const std::int64_t*>(target.ids->read());
  std::int64_t begin = 0;
  for (const Group& group : groups) {
    if (sizes_.recurrent && begin < group.start) {
      target.state->copy_rows(*source.state, begin, group.start);
    }
    begin = group.stop;
    for (std::int64_t row = group.start; row < group.stop; ++row) {
      target.held_ids[index_of(row)] = tokens[row];
      target.held_positions[index_of(row)] =
          positions[row] + (rows == nullptr ? 1 : (*rows)[index_of(row)].count);
    }
  }
  if (sizes_.recurrent && begin < sizes_.batch) {
    target.state->copy_rows(*source.state, begin, sizes_.batch);
  }
  current_ = 1 - current_;
}

void SessionTensors::forget() noexcept {
  for (Set& set : sets_) {
    std::fill(set.held_ids.begin(), set.held_ids.end(), kUnknown);
    std::fill(set.held_positions.begin(), set.held_positions.end(), kUnknown);
  }
}

void SessionTensors::clear_caches(std::int64_t row, std::int64_t begin, std::int64_t end) {
  if (begin >= end) {
    return;
  }
  for (LayerCache& cache : caches_) {
    cache.key->clear(row, begin, end);
    cache.value->clear(row, begin, end);
  }
}

/// Bind every input and output of the program by name, from own or from the session's tensors.
std::unique_ptr<Launch> SessionTensors::bind(Program& program, const Group& group, const OwnTensors& own,
                                             bool repeated) {
  Binding inputs;
  Binding outputs;
  for (const auto& [specs, binding] : {std::make_pair(&program.inputs(), &inputs),
                                       std::make_pair(&program.outputs(), &outputs)}) {
    for (const TensorSpec& spec : *specs) {
      const auto found = own.find(spec.name);
      binding->emplace(spec.name, found != own.end() ? found->second : shared(spec.name, group));
    }
  }
  return program.bind(inputs, outputs, repeated);
}

Rows SessionTensors::shared(const std::string& name, const Group& group) {
  Set& read = sets_[current_];
  Set& written = sets_[1 - current_];
  const std::map<std::string, Buffer*> buffers{
      {names::kPosition, read.position.get()},       {names::kState, read.state.get()},
      {names::kNextToken, written.ids.get()},        {names::kNextPosition, written.position.get()},
      {names::kNextState, written.state.get()},      {names::kLogits, logits_.get()}};
  const auto found = buffers.find(name);
  if (found != buffers.end() && found->second != nullptr) {
    return Rows{found->second, group.start, group.stop};
  }
  for (std::size_t layer = 0; layer < caches_.size(); ++layer) {
    const auto number = static_cast<std::int64_t>(layer);
    if (name == names::past_key_values_key(number) || name == names::present_key_values_key(number)) {
      return Rows{caches_[layer].key.get(), group.start, group.stop};
    }
    if (name == names::past_key_values_value(number) || name == names::present_key_values_value(number)) {
      return Rows{caches_[layer].value.get(), group.start, group.stop};
    }
  }
  throw Error(ErrorKind::contract, "a graph asks for a tensor '" + name + "' that the contract does not have");
}

}  // namespace crt
