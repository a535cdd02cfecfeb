// Everything a session holds: out of it, and back into it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/tensor_names.hpp"
#include "session/session_impl.hpp"
#include "session/snapshot_layout.hpp"

namespace crt {

namespace {

template <typename Value>
SnapshotTensor tensor_from(std::string name, const char* dtype, Shape shape, const Value* values, std::size_t count) {
  SnapshotTensor tensor{std::move(name), dtype, std::move(shape), {}};
  tensor.data.resize(count * sizeof(Value));
  if (count > 0) {
    std::memcpy(tensor.data.data(), values, tensor.data.size());
  }
  return tensor;
}

SnapshotTensor row_numbers(const char* name, const std::vector<std::int64_t>& values) {
  return tensor_from(name, "I64", {static_cast<std::int64_t>(values.size())}, values.data(), values.size());
}

template <typename Value>
std::vector<Value> values_of(const Snapshot& snapshot, const char* name) {
  const std::vector<unsigned char>& data = find_tensor(snapshot, name)->data;
  std::vector<Value> values(data.size() / sizeof(Value));
  if (!values.empty()) {
    std::memcpy(values.data(), data.data(), data.size());
  }
  return values;
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
  const auto vocab_values = static_cast<std::size_t>(sizes.batch * sizes.vocab);
  taken.tensors.push_back(tensor_from(names::kLogits, "F32", {sizes.batch, sizes.vocab}, logits(), vocab_values));
  taken.tensors.push_back(tensor_from("seen", "U8", {sizes.batch, sizes.vocab}, history.seen().data(), vocab_values));
  if (sizes.recurrent) {
    taken.tensors.push_back(tensor_from(names::kState, "F32", {sizes.batch, 1, sizes.hidden}, tensors.state(),
                                        static_cast<std::size_t>(sizes.batch * sizes.hidden)));
  }
  const std::int64_t length = *std::max_element(decoder.position().begin(), decoder.position().end());
  const Shape shape{sizes.batch, sizes.heads, length, sizes.head_dim};
  const char* dtype = snapshot_dtype(sizes.cache_dtype);
  const SessionCaches& caches = tensors.caches();
  for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
    const auto key = static_cast<std::size_t>(2 * layer);
    taken.tensors.push_back({names::past_key_values_key(layer), dtype, shape, caches.entries(key, length)});
    taken.tensors.push_back({names::past_key_values_value(layer), dtype, shape, caches.entries(key + 1, length)});
  }
  return taken;
}

void Session::Impl::restore(const Snapshot& snapshot) {
  check_snapshot(snapshot, setup);
  const TensorSizes& sizes = setup.sizes;
  // Copies, taken before anything changes: the snapshot's bytes may lie at any address.
  const auto position = values_of<std::int64_t>(snapshot, names::kPosition);
  const auto next_tokens = values_of<std::int64_t>(snapshot, "next_tokens");
  const auto logits = values_of<float>(snapshot, names::kLogits);
  const auto state = sizes.recurrent ? values_of<float>(snapshot, names::kState) : std::vector<float>();
  auto drawn = values_of<std::int64_t>(snapshot, "drawn");
  auto pending = values_of<std::int64_t>(snapshot, "pending");
  auto seen = values_of<std::uint8_t>(snapshot, "seen");
  auto recent = values_of<std::int64_t>(snapshot, "recent");
  auto held = values_of<std::int64_t>(snapshot, "held");
  std::vector<const unsigned char*> caches;
  for (std::int64_t layer = 0; layer < sizes.layers; ++layer) {
    caches.push_back(find_tensor(snapshot, names::past_key_values_key(layer))->data.data());
    caches.push_back(find_tensor(snapshot, names::past_key_values_value(layer))->data.data());
  }
  const std::int64_t length = *std::max_element(position.begin(), position.end());
  poisoning([&] {
    decoder.tensors().restore(caches, length, logits.data(), state.data());
    decoder.resume(position, next_tokens);
  });
  history.assign(std::move(drawn), std::move(pending), std::move(seen), std::move(recent), std::move(held));
  failure_.lift();
}

}  // namespace crt
