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

void check_passes(const PrefillPlan& plan, std::int64_t passes, bool iterated, const std::string& target) {
  if (passes < kAdaptive) out_of_range("passes", "", passes);
  if (!iterated && (passes > 0 || passes == kAdaptive)) {
    throw Error(ErrorKind::unsupported,
                "passes: this model has exactly one pass, which is exact; leave passes out");
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

PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool iterated,
                         std::int64_t unroll, const std::string& target) {
  const std::int64_t passes = options.passes;
  check_passes(plan, passes, iterated, target);
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
  if (iterated && by_steps) {
    rule.shortest = std::numeric_limits<std::int64_t>::max();
    return rule;
  }
  rule.passes = plan.passes.value_or(0);
  rule.shortest = iterated ? plan.shortest : 1;
  if (plan.residual_bound && (passes == kAdaptive || plan.method == PrefillMethod::adaptive)) {
    rule.bound = float_from(*plan.residual_bound);
    rule.passes = plan.passes.value_or(unroll);  // the unrolled graph cannot stop
  }
  return rule;
}

namespace {

using Numbers = std::vector<std::int64_t>;
using Values = std::vector<float>;
using NameOf = std::string (*)(const std::string& state);

std::size_t size_from(std::int64_t value) { return static_cast<std::size_t>(value); }

/// Everything by its name, whole.
Binding whole(const Tensors& tensors) {
  Binding binding;
  for (const auto& [name, buffer] : tensors) binding[name] = BufferSlice{buffer.get(), 0, buffer->shape()[0]};
  return binding;
}

void put(Tensors& tensors, Engine& engine, const std::string& name, Shape shape, DType dtype, const void* values) {
  (tensors[name] = engine.allocate(std::move(shape), dtype))->write(values);
}

/// Tokens first to first + width of every row, zeros behind each, and what goes with them.
Tensors tensors_of(const PrefillCall& call, Engine& engine, std::int64_t first, std::int64_t width) {
  Numbers ids(size_from(call.count * width), 0), lengths;
  for (std::int64_t row = 0; row < call.count; ++row) {
    const RowTokens& span = call.rows[row];
    lengths.push_back(std::min(span.count - first, width));
    std::copy_n(span.tokens + first, lengths.back(), ids.begin() + row * width);
  }
  Tensors tensors = own_tensors(engine, call.model, call.count, width);
  put(tensors, engine, names::kInputIds, {call.count, width}, DType::int64, ids.data());
  put(tensors, engine, names::kLength, {call.count}, DType::int64, lengths.data());
  return tensors;
}

/// The tokens of a chunk that are not exact yet, and their iterates: pairs of buffers that passes swap.
///
/// What is exact is dropped: the rest starts at a later position, from the iterates of the last exact token as its
/// states.
class Iteration {
 public:
  Iteration(const PrefillCall& call, Engine& engine, const SharedSlices& shared)
      : call_(call), engine_(engine), shared_(shared), program_(engine.program(names::kGraphPrefillPass)) {
    begin(0, call.seq);
  }

  /// One more pass; its residual, float32 [count].
  const float* run() {
    std::unique_ptr<Launch>& launch = launches_[turn_];
    if (launch == nullptr) launch = bind(names::iterate);
    launch->run();
    turn_ = 1 - turn_;
    return residual();
  }

  /// Leave out the first tokens of every row, but never the last token of one.
  void drop(std::int64_t exact) {
    std::int64_t first = exact;
    for (std::int64_t row = 0; row < call_.count; ++row) first = std::min(first, call_.rows[row].count - 1);
    if (first <= dropped_) return;
    std::vector<Values> before, rest;
    for (const StateSpec& state : call_.model.states) {
      before.push_back(cut(state, first - 1, 1));
      rest.push_back(cut(state, first, call_.seq - first));
    }
    begin(first, call_.seq - first);
    place(before);
    for (std::size_t index = 0; index < rest.size(); ++index) {
      tensors_.at(names::iterate(call_.model.states[index].name))->write(rest[index].data());
    }
  }

  /// Feed what follows the exact tokens of the one row token by token; the residual, float32 [1].
  const float* finish(std::int64_t exact) {
    std::vector<Values> before;
    for (const StateSpec& state : call_.model.states) before.push_back(cut(state, exact - 1, 1));
    begin(exact, 1);
    place(before);
    for (std::int64_t token = exact; token < call_.seq; ++token) {
      const std::int64_t position = call_.positions[0] + token;
      tensors_.at(names::kInputIds)->write(call_.rows[0].tokens + token);
      tensors_.at(names::kPosition)->write(&position);
      std::unique_ptr<Launch>& launch = launches_[turn_];
      // What a token leaves is the state of the next one: two buffers that steps swap.
      if (launch == nullptr) launch = bind(names::state);
      launch->run();
      turn_ = 1 - turn_;
    }
    return residual();
  }

 private:
  const float* residual() const { return static_cast<const float*>(tensors_.at(names::kResidual)->read()); }

  /// New tensors for these tokens.
  void begin(std::int64_t first, std::int64_t width) {
    launches_ = {};  // before what they are bound to
    tensors_ = tensors_of(call_, engine_, first, width);
    dropped_ = first;
    width_ = width;
    turn_ = 0;
  }

  /// Start where the dropped tokens end, and not where the chunk did; before: per state float32 [count, 1, *shape].
  void place(const std::vector<Values>& before) {
    Numbers positions(call_.positions, call_.positions + call_.count);
    std::for_each(positions.begin(), positions.end(), [this](std::int64_t& position) { position += dropped_; });
    put(tensors_, engine_, names::kPosition, {call_.count}, DType::int64, positions.data());
    for (std::size_t index = 0; index < before.size(); ++index) {
      const StateSpec& state = call_.model.states[index];
      put(tensors_, engine_, names::state(state.name), shape_of_tokens(call_.count, 1, state.shape), DType::float32,
          before[index].data());
    }
  }

  /// A launch that reads under these names what the one of the other turn writes as next iterates.
  std::unique_ptr<Launch> bind(NameOf read) {
    Binding own = whole(tensors_);
    for (const StateSpec& state : call_.model.states) {
      if (turn_ == 1) std::swap(own.at(read(state.name)), own.at(names::next_iterate(state.name)));
    }
    return bind_by_name(program_, own, shared_, false);
  }

  /// The iterate of some tokens, float32 [count, tokens, *shape].
  Values cut(const StateSpec& state, std::int64_t first, std::int64_t tokens) {
    Buffer& buffer = *tensors_.at(turn_ == 0 ? names::iterate(state.name) : names::next_iterate(state.name));
    const auto* iterate = static_cast<const float*>(buffer.read());
    const std::size_t row_values = buffer.row_bytes() / sizeof(float), token_values = row_values / size_from(width_);
    Values values;
    for (std::size_t row = 0; row < size_from(call_.count); ++row) {
      const float* begin = iterate + row * row_values + size_from(first - dropped_) * token_values;
      values.insert(values.end(), begin, begin + size_from(tokens) * token_values);
    }
    return values;
  }

  const PrefillCall& call_;
  Engine& engine_;
  const SharedSlices& shared_;
  Program& program_;
  std::int64_t dropped_ = 0;
  std::int64_t width_ = 0;
  std::size_t turn_ = 0;  // 0: the iterates are what passes read, 1: what they write, and they do both the other way
  Tensors tensors_;
  std::array<std::unique_ptr<Launch>, 2> launches_;  // go before what they are bound to
};

}  // namespace

Tensors own_tensors(Engine& engine, const ModelConfig& model, std::int64_t rows, std::int64_t seq) {
  Tensors tensors;
  tensors[names::kNextHidden] = engine.allocate({rows, seq, model.hidden}, DType::float32);
  if (!model.iterated) return tensors;
  for (const StateSpec& state : model.states) {
    for (const std::string& name : {names::iterate(state.name), names::next_iterate(state.name)}) {
      std::unique_ptr<Buffer>& tensor = tensors[name];
      if (tensor == nullptr) tensor = engine.allocate(shape_of_tokens(rows, seq, state.shape), DType::float32);
    }
  }
  tensors[names::kResidual] = engine.allocate({rows}, DType::float32);
  return tensors;
}

void PrefillCall::run(Engine& engine, const SharedSlices& shared, float* residual) const {
  if (passes == 0) {
    const Tensors own = tensors_of(*this, engine, 0, seq);
    bind_by_name(engine.program(names::kGraphPrefill), whole(own), shared, false)->run();
    if (model.iterated) std::copy_n(static_cast<const float*>(own.at(names::kResidual)->read()), count, residual);
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
