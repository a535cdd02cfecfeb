#include "session/prefill.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>

#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"

namespace crt {
namespace {

[[noreturn]] void out_of_range(const char* name, const std::string& limits, std::int64_t found) {
  throw Error(ErrorKind::input,
              std::string(name) + " must be at least 1" + limits + ", found " + std::to_string(found));
}

void check_passes(const PrefillPlan& plan, std::int64_t passes, bool recurrent, const std::string& target) {
  if (passes < kAdaptive) out_of_range("passes", "", passes);
  if (!recurrent && (passes > 0 || passes == kAdaptive)) {
    throw Error(ErrorKind::unsupported,
                "passes: a plain transformer has exactly one pass, which is exact; leave passes out");
  }
  if (passes == kAdaptive && !plan.residual_bound) {
    throw Error(ErrorKind::unsupported,
                target + " has no bound for the residual, so there is no telling when passes may stop: its bundle was "
                         "built without a text that the model predicts; give a number of passes or 'exact'");
  }
}

/// As numpy compares a float32 with a number: in float32.
float float_from(double bound) {
  return static_cast<float>(std::min(bound, static_cast<double>(std::numeric_limits<float>::max())));
}

}  // namespace

PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool recurrent,
                         std::int64_t unroll, const std::string& target) {
  const std::int64_t passes = options.passes;
  check_passes(plan, passes, recurrent, target);
  if (options.chunk < 0 || options.chunk > most) {
    out_of_range("chunk", " and at most " + std::to_string(most), options.chunk);
  }
  PrefillRule rule;
  rule.chunk = most;
  if (passes == kTargetsChoice || passes == kAdaptive) rule.chunk = std::min(plan.chunk.value_or(most), most);
  rule.chunk = options.chunk == 0 ? rule.chunk : options.chunk;
  if (passes > 0) {
    rule.passes = passes == unroll ? 0 : passes;
    return rule;
  }
  const bool by_steps = passes == kExact || (passes == kTargetsChoice && plan.method == PrefillMethod::steps);
  if (recurrent && by_steps) {
    rule.shortest = std::numeric_limits<std::int64_t>::max();
    return rule;
  }
  rule.passes = plan.passes.value_or(0);
  rule.shortest = recurrent ? plan.shortest : 1;
  if (plan.residual_bound && (passes == kAdaptive || plan.method == PrefillMethod::adaptive)) {
    rule.bound = float_from(*plan.residual_bound);
    rule.passes = plan.passes.value_or(unroll);  // the unrolled graph cannot stop
  }
  return rule;
}

namespace {

using Numbers = std::vector<std::int64_t>;
using Values = std::vector<float>;
using BufferPointer = std::unique_ptr<Buffer>;

std::size_t size_from(std::int64_t value) { return static_cast<std::size_t>(value); }

BufferSlice whole(const BufferPointer& buffer) { return BufferSlice{buffer.get(), 0, buffer->shape()[0]}; }

BufferPointer filled(Engine& engine, Shape shape, DType dtype, const void* values) {
  BufferPointer buffer = engine.allocate(std::move(shape), dtype);
  buffer->write(values);
  return buffer;
}

/// Tokens first to the end of every row, int64 [count, seq - first], zeros behind each.
Numbers padded(const PrefillCall& call, std::int64_t first) {
  const std::int64_t width = call.seq - first;
  Numbers ids(size_from(call.count * width), 0);
  for (std::int64_t row = 0; row < call.count; ++row) {
    const RowTokens& span = call.rows[row];
    std::copy(span.tokens + first, span.tokens + span.count, ids.begin() + row * width);
  }
  return ids;
}

/// What follows the first tokens of every row.
Numbers lengths_after(const PrefillCall& call, std::int64_t first) {
  Numbers lengths;
  for (std::int64_t row = 0; row < call.count; ++row) lengths.push_back(call.rows[row].count - first);
  return lengths;
}

/// The tokens of a chunk that are not exact yet, and their iterate: two buffers that passes swap.
///
/// What is exact is dropped: the rest starts at a later position, from the h of the last exact token as its state.
class Iteration {
 public:
  Iteration(const PrefillCall& call, Engine& engine, const SharedSlices& shared)
      : call_(call),
        engine_(engine),
        shared_(shared),
        program_(engine.program(names::kGraphPrefillPass)),
        residual_(engine.allocate({call.count}, DType::float32)) {
    begin();
  }

  /// One more pass; its residual, float32 [count].
  const float* run() {
    std::unique_ptr<Launch>& launch = launches_[current_];
    if (launch == nullptr) {
      Binding own = own_;
      own[names::kHidden] = whole(iterates_[current_]);
      own[names::kNextHidden] = whole(iterates_[1 - current_]);
      launch = bind_by_name(program_, own, shared_, false);
    }
    launch->run();
    current_ = 1 - current_;
    return residual();
  }

  /// Leave out the first tokens of every row, but never the last token of one.
  void drop(std::int64_t exact) {
    const Numbers lengths = lengths_after(call_, 0);
    const std::int64_t first = std::min(exact, *std::min_element(lengths.begin(), lengths.end()) - 1);
    if (first <= dropped_) return;
    const Values state = state_before(first);
    const Values rest = iterate_from(first);
    dropped_ = first;
    begin();
    place(first, state);
    iterates_[0]->write(rest.data());
  }

  /// Feed what follows the exact tokens of the one row token by token; the residual, float32 [1].
  const float* finish(std::int64_t exact) {
    const Values state = state_before(exact);
    dropped_ = exact;
    const Numbers one(1, 1);
    launches_ = {};
    ids_ = engine_.allocate({1, 1}, DType::int64);
    length_ = filled(engine_, {1}, DType::int64, one.data());
    const BufferPointer hidden = engine_.allocate({1, 1, call_.hidden}, DType::float32);
    own_ = {{names::kInputIds, whole(ids_)},
            {names::kLength, whole(length_)},
            {names::kHidden, whole(hidden)},
            {names::kResidual, whole(residual_)}};
    place(exact, state);
    // The h of a token is the state of the next one: two buffers that steps swap.
    const BufferPointer other = engine_.allocate({1, 1, call_.hidden}, DType::float32);
    std::array<std::unique_ptr<Launch>, 2> launches;
    for (std::size_t turn = 0; turn < 2; ++turn) {
      own_[names::kState] = whole(turn == 0 ? state_ : other);
      own_[names::kNextHidden] = whole(turn == 0 ? other : state_);
      launches[turn] = bind_by_name(program_, own_, shared_, false);
    }
    for (std::int64_t token = exact; token < call_.seq; ++token) {
      const std::int64_t position = call_.positions[0] + token;
      ids_->write(call_.rows[0].tokens + token);
      position_->write(&position);
      launches[size_from((token - exact) % 2)]->run();
    }
    return residual();
  }

 private:
  const float* residual() const { return static_cast<const float*>(residual_->read()); }

  /// New tensors for the tokens that are left; the first iterate is zeros, as allocated.
  void begin() {
    const std::int64_t width = call_.seq - dropped_;
    launches_ = {};  // before what they are bound to
    ids_ = filled(engine_, {call_.count, width}, DType::int64, padded(call_, dropped_).data());
    length_ = filled(engine_, {call_.count}, DType::int64, lengths_after(call_, dropped_).data());
    for (BufferPointer& iterate : iterates_) {
      iterate = engine_.allocate({call_.count, width, call_.hidden}, DType::float32);
    }
    current_ = 0;
    own_ = {{names::kInputIds, whole(ids_)}, {names::kLength, whole(length_)}, {names::kResidual, whole(residual_)}};
  }

  /// Start there, and not where the chunk did; state: float32 [count, 1, hidden].
  void place(std::int64_t first, const Values& state) {
    Numbers positions(call_.positions, call_.positions + call_.count);
    std::for_each(positions.begin(), positions.end(), [first](std::int64_t& position) { position += first; });
    position_ = filled(engine_, {call_.count}, DType::int64, positions.data());
    state_ = filled(engine_, {call_.count, 1, call_.hidden}, DType::float32, state.data());
    own_[names::kPosition] = whole(position_);
    own_[names::kState] = whole(state_);
  }

  /// h of the token before first, float32 [count, 1, hidden].
  Values state_before(std::int64_t first) const { return cut(first - 1, 1); }
  /// h of the tokens from first on, float32 [count, seq - first, hidden].
  Values iterate_from(std::int64_t first) const { return cut(first, call_.seq - first); }

  Values cut(std::int64_t first, std::int64_t tokens) const {
    const auto* iterate = static_cast<const float*>(iterates_[current_]->read());
    const std::int64_t row_values = (call_.seq - dropped_) * call_.hidden;
    Values values;
    values.reserve(size_from(call_.count * tokens * call_.hidden));
    for (std::int64_t row = 0; row < call_.count; ++row) {
      const float* begin = iterate + row * row_values + (first - dropped_) * call_.hidden;
      values.insert(values.end(), begin, begin + tokens * call_.hidden);
    }
    return values;
  }

  const PrefillCall& call_;
  Engine& engine_;
  const SharedSlices& shared_;
  Program& program_;
  std::int64_t dropped_ = 0;
  BufferPointer ids_;
  BufferPointer length_;
  BufferPointer position_;
  BufferPointer state_;
  BufferPointer residual_;
  std::array<BufferPointer, 2> iterates_;
  std::size_t current_ = 0;  // the one that holds the iterate
  Binding own_;
  std::array<std::unique_ptr<Launch>, 2> launches_;  // go before what they are bound to
};

void run_unrolled(const PrefillCall& call, Engine& engine, const SharedSlices& shared, float* residual) {
  const BufferPointer ids = filled(engine, {call.count, call.seq}, DType::int64, padded(call, 0).data());
  const BufferPointer length = filled(engine, {call.count}, DType::int64, lengths_after(call, 0).data());
  const BufferPointer hidden = engine.allocate({call.count, call.seq, call.hidden}, DType::float32);
  const BufferPointer next_hidden = engine.allocate({call.count, call.seq, call.hidden}, DType::float32);
  const BufferPointer found = engine.allocate({call.count}, DType::float32);
  const Binding own{{names::kInputIds, whole(ids)},
                    {names::kLength, whole(length)},
                    {names::kHidden, whole(hidden)},
                    {names::kNextHidden, whole(next_hidden)},
                    {names::kResidual, whole(found)}};
  bind_by_name(engine.program(names::kGraphPrefill), own, shared, false)->run();
  if (call.recurrent) std::copy_n(static_cast<const float*>(found->read()), call.count, residual);
}

}  // namespace

void PrefillCall::run(Engine& engine, const SharedSlices& shared, float* residual) const {
  if (passes == 0) {
    run_unrolled(*this, engine, shared, residual);
    return;
  }
  Iteration chunk(*this, engine, shared);
  const auto reached = [this](const float* found) {
    return bound && std::all_of(found, found + count, [this](float value) { return value <= *bound; });
  };
  // After k passes the first k tokens of every row are exact: more passes than tokens change nothing.
  const std::int64_t most = std::min(passes, seq);
  const float* found = chunk.run();
  std::int64_t done = 1;
  for (; done < most && !reached(found); ++done) {
    if (engine.host_memory()) chunk.drop(done);
    found = chunk.run();
  }
  const bool enough = !bound || done == seq || reached(found);
  // NaN is below no bound and gets no better: the caller refuses it.
  if (!enough && std::all_of(found, found + count, [](float value) { return std::isfinite(value); })) {
    found = chunk.finish(done);
  }
  std::copy_n(found, count, residual);
}

std::unique_ptr<Launch> bind_by_name(Program& program, const Binding& own, const SharedSlices& shared, bool repeated) {
  const auto bound = [&](const std::vector<TensorSpec>& specs) {
    Binding binding;
    for (const TensorSpec& spec : specs) {
      const auto found = own.find(spec.name);
      binding.emplace(spec.name, found != own.end() ? found->second : shared(spec.name));
    }
    return binding;
  };
  return program.bind(bound(program.inputs()), bound(program.outputs()), repeated);
}

}  // namespace crt
