// The tensors of one session: allocated once and bound to the engine's graphs. The C++ twin of
// crt_export/runtime/tensors.py.
//
// What a call leaves for the next one (states, next token, next position) goes from one set of buffers to the other, as
// the contract pairs them, and the two swap roles: none of them aliases its input, and a greedy loop feeds itself
// without an upload. Caches are bound as input and output at the same address, so they are updated in place.
//
// On a CPU the step is a pass over one token: one graph serves both, with one packed copy of the weights.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "engine/engine.hpp"
#include "session/caches.hpp"
#include "session/prefill.hpp"
#include "session/rows.hpp"

namespace crt {

using NamedBuffers = std::vector<std::pair<std::string, Buffer*>>;

class SessionTensors {
 public:
  /// Allocates everything, zeroed; the logits are NaN, because a row without any token has none.
  /// rows_are_independent: whether rows may share a call of the engine.
  SessionTensors(Engine& engine, const TensorSizes& sizes, bool rows_are_independent = true);

  /// Run one token per row of the batches; all others stay as they are. ids and positions: int64 [batch], positions are
  /// the tokens in the cache before this one. Allocates nothing once its launches exist, until the caches grow.
  void step(const std::int64_t* ids, const std::int64_t* positions, const std::vector<Batch>& batches);

  /// Run several tokens per row of the batches. passes: 0 for as many as the bundle was built with, else that many
  /// calls of prefill_pass. bound: residual at which passes end, for batches of one row; unset: after all of them.
  /// residual: float32 [batch], filled for the rows of the batches if the model is iterated.
  void prefill(const std::vector<RowTokens>& rows, const std::int64_t* positions, const std::vector<Batch>& batches,
               std::int64_t passes, std::optional<float> bound, std::vector<float>& residual);

  /// float32 [batch, vocab]: each row's after its last call, NaN if it had none; valid until the next call.
  const float* logits() { return static_cast<const float*>(logits_->read()); }
  /// Current states, float32 [batch, 1, *shape], and the names of the graphs' inputs.
  const NamedBuffers& states() const noexcept { return double_buffer_[current_].states; }
  /// int64 [batch]: the engine's argmax of the rows that took part in the last call.
  const std::int64_t* next_tokens() const noexcept { return double_buffer_[current_].held_ids.data(); }

  /// Zero every cache entry beyond the positions, and the states of rows at position 0, whose logits become NaN.
  void clear(const std::int64_t* positions);
  /// Replace caches and states by those of a snapshot. caches: keys and values of each in turn, [batch, heads, length,
  /// head_dim]; zeros go behind them. states: each as in states().
  void restore(const std::vector<const unsigned char*>& caches, std::int64_t length, const float* logits,
               const std::vector<std::vector<float>>& states);
  /// Take everything from the tensors of another session of the same sizes.
  void assign(SessionTensors& other);

  const TensorSizes& sizes() const noexcept { return sizes_; }
  SessionCaches& caches() noexcept { return caches_; }
  /// Number of step launches that are kept.
  std::size_t launches() const noexcept { return step_launches_.size(); }
  /// The launch of the next step over these rows, to be timed or counted on its own.
  Launch& step_launch(const Batch& batch);

 private:
  /// What one call leaves for the next. held: what the buffers hold, as far as the host knows, else -1.
  struct Half {
    Tensors tensors;  ///< by the name of the input
    Buffer* ids = nullptr;
    Buffer* position = nullptr;
    NamedBuffers states;
    std::vector<std::int64_t> held_ids;
    std::vector<std::int64_t> held_positions;
  };

  void feed(std::vector<std::int64_t>& held, Buffer& buffer, const std::int64_t* values,
            const std::vector<Batch>& batches);
  void finish(const std::int64_t* positions, const std::vector<Batch>& batches, const std::vector<RowTokens>* rows);
  void forget() noexcept;
  void make_room(const std::int64_t* positions, const std::vector<Batch>& batches);
  BufferSlice shared(const std::string& name, const Batch& batch);

  Engine& engine_;
  TensorSizes sizes_;
  std::array<Half, 2> double_buffer_;
  std::size_t current_ = 0;
  std::unique_ptr<Buffer> logits_;
  SessionCaches caches_;
  std::map<std::string, std::string> continued_;  // output to the input that it continues
  Tensors one_token_;  // what a graph of any number of tokens takes and gives besides, when it makes a step
  std::uint64_t bound_moves_ = 0;  // of the caches, when the launches were bound
  std::map<std::tuple<std::int64_t, std::int64_t, std::size_t>, std::unique_ptr<Launch>> step_launches_;
};

}  // namespace crt
