// Snapshots of sessions: a restored session goes on as the first would have, and whatever does not fit is refused.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>

#include "crt_runtime/session.hpp"
#include "given_bundle.hpp"

namespace {

using crt::Session;
using crt::Snapshot;
using crt::SnapshotTensor;
using crt_test::contains;
using crt_test::error_text;
using crt_test::row_of;
using crt_test::some_tokens;

Session open(crt::Bundle& bundle, std::int64_t batch = 2, std::int64_t capacity = 32) {
  crt::SessionOptions options;
  options.batch = batch;
  options.capacity = capacity;
  return bundle.session("ort-cpu-fp32", options);
}

SnapshotTensor& tensor_of(Snapshot& snapshot, const std::string& name) {
  return *std::find_if(snapshot.tensors.begin(), snapshot.tensors.end(),
                       [&](const SnapshotTensor& tensor) { return tensor.name == name; });
}

template <typename Value>
void put(Snapshot& snapshot, const std::string& name, std::size_t index, Value value) {
  std::memcpy(tensor_of(snapshot, name).data.data() + index * sizeof(Value), &value, sizeof(Value));
}

}  // namespace

TEST_CASE("snapshot: a session of another capacity goes on with the same numbers and the same history") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle);
  session.prefill({some_tokens(6), some_tokens(2, 1)});
  crt::GenerationOptions options;
  options.sampling.temperature = 1.0;
  options.sampling.repetition_penalty = 1.3;
  options.sampling.seed = 5;
  options.max_new_tokens = 3;
  options.ignore_eos = true;
  std::vector<std::int64_t> tokens(2);
  const auto draw = [&](Session& from) {
    std::vector<std::int64_t> drawn;
    crt::Generation generation = from.generate({}, options);
    while (generation.next(tokens.data())) {
      drawn.insert(drawn.end(), tokens.begin(), tokens.end());
    }
    return drawn;
  };
  draw(session);
  const Snapshot taken = session.snapshot();
  Session other = open(bundle, 2, 24);
  other.step({99, 98});
  other.restore(taken);
  CHECK(other.position()[0] == session.position()[0]);
  CHECK(std::equal(other.next_tokens(), other.next_tokens() + 2, session.next_tokens()));
  const std::vector<std::int64_t> wanted = draw(session);
  CHECK(draw(other) == wanted);
  CHECK(row_of(other.logits(), 1, other.vocab_size()) == row_of(session.logits(), 1, other.vocab_size()));
}

TEST_CASE("snapshot: an empty session's is empty, and takes everything away") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Snapshot empty = open(bundle).snapshot();
  CHECK(tensor_of(empty, "past_key_values.0.key").data.empty());
  Session session = open(bundle);
  session.prefill({some_tokens(6), some_tokens(2, 1)});
  session.restore(empty);
  CHECK(session.position()[0] == 0);
  CHECK(session.next_tokens()[0] == crt::kNoToken);
  Session fresh = open(bundle);
  const std::vector<float> wanted = row_of(fresh.step({40, 41}), 1, fresh.vocab_size());
  CHECK(row_of(session.step({40, 41}), 1, fresh.vocab_size()) == wanted);
}

TEST_CASE("snapshot: what no session of this kind holds is refused, and the session stays as it was") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle);
  session.prefill({some_tokens(6), some_tokens(2, 1)});
  Session twin = session.fork();
  const Snapshot good = session.snapshot();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::pair<std::function<void(Snapshot&)>, std::string>> changes{
      {[](Snapshot& s) { s.bundle = std::string(64, '0'); }, "it was taken with the bundle 0000000000000000, this one"},
      {[](Snapshot& s) { s.target = "trt"; }, "it was taken on target 'trt', this session runs on 'ort-cpu-fp32'"},
      {[](Snapshot& s) { s.tensors.clear(); }, "position must be int64 [batch]"},
      {[](Snapshot& s) { tensor_of(s, "position").shape = {1}; }, "position must be int64 [batch]"},
      {[](Snapshot& s) { tensor_of(s, "position").data.pop_back(); }, "position must be int64 [batch]"},
      {[](Snapshot& s) { put<std::int64_t>(s, "position", 1, -1); }, "row 1 holds -1 tokens"},
      {[](Snapshot& s) { put<std::int64_t>(s, "position", 0, 33); }, "row 0 holds 33 tokens"},
      {[](Snapshot& s) { put<std::int64_t>(s, "position", 0, 7); }, "past_key_values.0.key must be float32"},
      {[](Snapshot& s) { tensor_of(s, "state").name = "other"; }, "state is missing\n  - other is unknown"},
      {[](Snapshot& s) { s.tensors.push_back(s.tensors[1]); }, "stands twice"},
      {[](Snapshot& s) { tensor_of(s, "seen").dtype = "F32"; }, "seen must be uint8 [2, 256], found float32 [2, 256]"},
      {[](Snapshot& s) { tensor_of(s, "state").data.pop_back(); }, "which is not what its shape takes"},
      {[](Snapshot& s) { put(s, "state", 0, kNaN); }, "row 0: state is not finite"},
      {[](Snapshot& s) { put(s, "logits", 300, kNaN); }, "row 1: logits is not finite"},
      {[](Snapshot& s) { put(s, "past_key_values.0.value", 0, kNaN); }, "row 0: past_key_values.0.value is not finite"},
      {[](Snapshot& s) { put<std::int64_t>(s, "pending", 0, 256); }, "row 0: the pending token 256 is outside"},
      {[](Snapshot& s) { put<std::int64_t>(s, "next_tokens", 1, -1); }, "row 1: the next token -1 is outside"},
      {[](Snapshot& s) { put<std::int64_t>(s, "drawn", 0, -4); }, "row 0: -4 random draws"},
      {[](Snapshot& s) { put<std::int64_t>(s, "drawn", 1, (std::int64_t{1} << 62U) + 1); },
       "row 1: 4611686018427387905 random draws, must be 0 to 4611686018427387904"},
      {[](Snapshot& s) { tensor_of(s, "seen").data[5] = 2; }, "row 0: seen must be 0 or 1"},
      {[](Snapshot& s) { put<std::int64_t>(s, "recent", 1500, 256); }, "row 1: a recent token is outside"},
      {[](Snapshot& s) { put<std::int64_t>(s, "recent", 3, -2); }, "row 0: a recent token is outside"},
      {[](Snapshot& s) { put<std::int64_t>(s, "held", 1, -1); }, "row 1: -1 characters held back"},
      {[](Snapshot& s) { tensor_of(s, "recent").shape = {2, 512}; },
       "recent must be int64 [2, 1024], found int64 [2, 512]"},
  };
  for (const auto& [change, part] : changes) {
    Snapshot changed = good;
    change(changed);
    const std::string text = error_text(crt::ErrorKind::bundle, [&] { session.restore(changed); });
    CHECK_MESSAGE(contains(text, part), text, " / wanted: ", part);
  }
  Session other_batch = open(bundle, 3);
  CHECK(contains(error_text(crt::ErrorKind::bundle, [&] { other_batch.restore(good); }),
                 "it holds 2 rows, this session has a batch of 3"));
  const std::vector<float> wanted = row_of(twin.step({50, 51}), 0, twin.vocab_size());
  CHECK(row_of(session.step({50, 51}), 0, twin.vocab_size()) == wanted);
}

TEST_CASE("snapshot: values beyond a row's position are not taken over") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle);
  session.prefill({some_tokens(6), some_tokens(2, 1)});
  Snapshot taken = session.snapshot();
  SnapshotTensor& keys = tensor_of(taken, "past_key_values.0.key");
  const auto channels = static_cast<std::size_t>(keys.shape[3]);
  const std::size_t heads = static_cast<std::size_t>(keys.shape[1]);
  put(taken, keys.name, (heads * 6 + 5) * channels, std::numeric_limits<float>::quiet_NaN());  // row 1, entry 5 of 2
  Session other = open(bundle);
  other.restore(taken);
  const std::vector<float> wanted = row_of(session.step({50, 51}), 1, session.vocab_size());
  CHECK(row_of(other.step({50, 51}), 1, session.vocab_size()) == wanted);
}
