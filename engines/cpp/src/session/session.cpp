// A session: it runs the model, takes everything out for a snapshot and puts it back.
#include <algorithm>
#include <cstring>
#include <utility>

#include "crt_runtime/error.hpp"
#include "crt_runtime/session.hpp"
#include "engine/tensor_names.hpp"
#include "session/session_impl.hpp"
#include "session/snapshot.hpp"
#include "text/messages.hpp"

namespace crt {

Exclusive::Exclusive(std::atomic_flag& busy) : busy_(busy) {
  if (busy_.test_and_set(std::memory_order_acquire)) {
    throw Error(ErrorKind::input,
                "this session is busy with a call of another thread; use one session per thread, or a lock");
  }
}

void Failure::keep(const char* reason) noexcept {
  happened_ = true;
  reason_.clear();
  try {
    const std::string text = reason;
    reason_ = text.empty() ? "an exception without a message" : text.substr(0, text.find('\n'));
  } catch (const std::exception&) {
    // No memory for the words; the session is closed all the same.
  }
}

void Failure::require_none() const {
  if (!happened_) return;
  const std::string reason = reason_.empty() ? "there was no memory to keep its message" : reason_;
  throw Error(ErrorKind::input,
              "an earlier call of this session failed (" + reason + "); call reset() or restore() before going on");
}

Session::Impl::Impl(std::shared_ptr<Engine> engine, SessionSetup opened)
    : setup(std::move(opened)), decoder(std::move(engine), setup), history(setup.sizes.batch, setup.sizes.model.vocab) {
  const auto batch = static_cast<std::size_t>(setup.sizes.batch);
  for (std::vector<std::int64_t>* numbers : {&before_, &lengths_, &ids_}) numbers->assign(batch, 0);
}

void Session::Impl::require_usable() const { failure_.require_none(); }

const float* Session::Impl::logits() {
  const float* values = nullptr;
  poisoning([&] { values = decoder.logits(); });
  return values;
}

void Session::Impl::prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillOptions& options) {
  check_token_rows(rows, setup.sizes.batch, setup.sizes.model.vocab);
  bool any = false;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    lengths_[row] = static_cast<std::int64_t>(rows[row].size());
    any = any || !rows[row].empty();
  }
  if (!any) throw Error(ErrorKind::input, "empty prompt: prefill needs at least one token in at least one row");
  const PrefillRule rule = decoder.rule_of(options);
  decoder.check_room(lengths_);
  poisoning([&] { decoder.prefill(rows, rule); });
  for (std::size_t row = 0; row < rows.size(); ++row) {
    history.feed(static_cast<std::int64_t>(row), rows[row].data(), rows[row].size());
  }
}

void Session::Impl::step(const std::int64_t* tokens, std::size_t count, bool check_logits) {
  set_step(tokens, count);
  decoder.check_room(lengths_);
  poisoning([&] { decoder.step(ids_, lengths_, check_logits); });
  for (std::size_t row = 0; row < ids_.size(); ++row) {
    history.feed(static_cast<std::int64_t>(row), &ids_[row], static_cast<std::size_t>(lengths_[row]));
  }
}

/// Check the tokens of a step and put them into ids_ and lengths_.
void Session::Impl::set_step(const std::int64_t* tokens, std::size_t count) {
  if (count != ids_.size()) {
    throw Error(ErrorKind::input, "expected one token id per row: batch is " + std::to_string(ids_.size()) +
                                      ", found " + std::to_string(count));
  }
  std::vector<std::string> problems;
  bool any = false;
  for (std::size_t row = 0; row < count; ++row) {
    const bool given = tokens[row] != kNoToken;
    if (given && (tokens[row] < 0 || tokens[row] >= setup.sizes.model.vocab)) {
      problems.push_back("row " + std::to_string(row) + ": token id " + std::to_string(tokens[row]) +
                         " is outside the vocabulary (0 to " + std::to_string(setup.sizes.model.vocab - 1) + ")");
    }
    // Rows that take no part keep a valid id: every id of the tensor may be looked up.
    ids_[row] = given ? tokens[row] : 0;
    lengths_[row] = given ? 1 : 0;
    any = any || given;
  }
  if (!problems.empty()) refuse_problems(ErrorKind::input, "token ids", problems);
  if (!any) throw Error(ErrorKind::input, "step needs a token in at least one row");
}

void Session::Impl::reset() {
  // A half reset session gives neither its old values nor those of a new one.
  poisoning([&] {
    decoder.reset();
    history.clear();
  });
  failure_.lift();
}

std::unique_ptr<Session::Impl> Session::Impl::fork() {
  auto other = std::make_unique<Impl>(decoder.engine(), setup);
  other->decoder.assign(decoder);
  other->history = history;
  return other;
}

// --- The calls of an application: one at a time, refused after a failure -----------------------------------------

Session::Session(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;

const std::string& Session::target() const noexcept { return impl_->setup.target; }
std::int64_t Session::batch() const noexcept { return impl_->setup.sizes.batch; }
std::int64_t Session::capacity() const noexcept { return impl_->setup.sizes.capacity; }
std::int64_t Session::vocab_size() const noexcept { return impl_->setup.sizes.model.vocab; }
const std::vector<std::int64_t>& Session::eos_token_ids() const noexcept { return config().eos_token_ids; }
const std::int64_t* Session::position() const noexcept { return impl_->decoder.position().data(); }

const float* Session::logits() {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  return impl_->logits();
}

const std::int64_t* Session::next_tokens() {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  return impl_->decoder.next_tokens().data();
}

const float* Session::prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillOptions& options) {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  impl_->prefill(rows, options);
  return impl_->logits();
}

const float* Session::step(const std::int64_t* tokens, std::size_t count) {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  impl_->step(tokens, count, true);
  return impl_->logits();
}

void Session::advance(const std::int64_t* tokens, std::size_t count) {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  impl_->step(tokens, count, false);
}

void Session::reset() {
  const Exclusive held(impl_->busy);
  impl_->reset();
}

Snapshot Session::snapshot() {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  return impl_->snapshot();
}

void Session::restore(const Snapshot& snapshot) {
  const Exclusive held(impl_->busy);
  impl_->restore(snapshot);
}

Session Session::fork() {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  return Session(impl_->fork());
}

// --- For Generation ----------------------------------------------------------------------------------------------

History& Session::history() noexcept { return impl_->history; }
const ModelConfig& Session::config() const noexcept { return impl_->setup.sizes.model; }
bool Session::slides() const noexcept { return impl_->setup.slides; }
void Session::fail(const char* reason) noexcept { impl_->fail(reason); }

void Session::require_usable(std::int64_t passes) {
  const Exclusive held(impl_->busy);
  impl_->require_usable();
  PrefillOptions options;
  options.passes = passes;
  static_cast<void>(impl_->decoder.rule_of(options));
}

namespace {

template <typename Value>
SnapshotTensor tensor_from(std::string name, const char* dtype, Shape shape, const Value* values, std::size_t count) {
  SnapshotTensor tensor{std::move(name), dtype, std::move(shape), {}};
  tensor.data.resize(count * sizeof(Value));
  if (count > 0) std::memcpy(tensor.data.data(), values, tensor.data.size());
  return tensor;
}

SnapshotTensor row_numbers(const char* name, const std::vector<std::int64_t>& values) {
  return tensor_from(name, "I64", {static_cast<std::int64_t>(values.size())}, values.data(), values.size());
}

}  // namespace

Snapshot Session::Impl::snapshot() {
  const TensorSizes& sizes = setup.sizes;
  SessionTensors& tensors = decoder.tensors();
  Snapshot taken{setup.bundle, setup.target, {}};
  taken.tensors.push_back(row_numbers(names::kPosition, decoder.position()));
  taken.tensors.push_back(row_numbers("next_tokens", decoder.next_tokens()));
  taken.tensors.push_back(row_numbers("drawn", history.drawn()));
  taken.tensors.push_back(row_numbers("pending", history.pending()));
  taken.tensors.push_back(row_numbers("held", history.held()));
  taken.tensors.push_back(tensor_from("recent", "I64", {sizes.batch, static_cast<std::int64_t>(kRecentTokens)},
                                      history.recent().data(), history.recent().size()));
  const auto vocab_values = static_cast<std::size_t>(sizes.batch * sizes.model.vocab);
  taken.tensors.push_back(tensor_from(names::kLogits, "F32", {sizes.batch, sizes.model.vocab}, logits(), vocab_values));
  taken.tensors.push_back(
      tensor_from("seen", "U8", {sizes.batch, sizes.model.vocab}, history.seen().data(), vocab_values));
  for (const auto& [name, buffer] : tensors.states()) {
    const auto* values = static_cast<const float*>(buffer->read());
    taken.tensors.push_back(tensor_from(name, "F32", buffer->shape(), values, buffer->bytes() / sizeof(float)));
  }
  const std::int64_t length = *std::max_element(decoder.position().begin(), decoder.position().end());
  for (std::size_t index = 0; index < tensors.caches().count(); ++index) {
    const SessionCaches& caches = tensors.caches();
    const CacheSpec& spec = sizes.model.caches[index / 2];
    taken.tensors.push_back({cache_name(index), snapshot_dtype(sizes.cache_dtype),
                             {sizes.batch, spec.heads, length, spec.head_dim}, caches.entries(index, length)});
  }
  return taken;
}

void Session::Impl::restore(const Snapshot& snapshot) {
  check_snapshot(snapshot, setup);
  // Copies, taken before anything changes: the snapshot's bytes may lie at any address.
  const auto position = values_of<std::int64_t>(*find_tensor(snapshot, names::kPosition));
  const auto next_tokens = values_of<std::int64_t>(*find_tensor(snapshot, "next_tokens"));
  const auto logits = values_of<float>(*find_tensor(snapshot, names::kLogits));
  auto drawn = values_of<std::int64_t>(*find_tensor(snapshot, "drawn"));
  auto pending = values_of<std::int64_t>(*find_tensor(snapshot, "pending"));
  auto seen = values_of<std::uint8_t>(*find_tensor(snapshot, "seen"));
  auto recent = values_of<std::int64_t>(*find_tensor(snapshot, "recent"));
  auto held = values_of<std::int64_t>(*find_tensor(snapshot, "held"));
  std::vector<std::vector<float>> states;
  for (const auto& state : decoder.tensors().states()) {
    states.push_back(values_of<float>(*find_tensor(snapshot, state.first)));
  }
  std::vector<const unsigned char*> caches;
  for (std::size_t index = 0; index < decoder.tensors().caches().count(); ++index) {
    caches.push_back(find_tensor(snapshot, cache_name(index))->data.data());
  }
  const std::int64_t length = *std::max_element(position.begin(), position.end());
  poisoning([&] {
    decoder.tensors().restore(caches, length, logits.data(), states);
    decoder.resume(position, next_tokens);
  });
  history.assign(std::move(drawn), std::move(pending), std::move(seen), std::move(recent), std::move(held));
  failure_.lift();
}

}  // namespace crt
