#include "selftest/replay.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

#include "engine/engine.hpp"
#include "session/float16.hpp"

namespace crt {

namespace {

std::vector<float> floats_of(const SnapshotTensor& tensor) {
  std::vector<float> values;
  if (tensor.dtype == "F16") {
    std::vector<std::uint16_t> bits(tensor.data.size() / sizeof(std::uint16_t));
    if (!bits.empty()) {
      std::memcpy(bits.data(), tensor.data.data(), bits.size() * sizeof(std::uint16_t));
    }
    values.reserve(bits.size());
    for (const std::uint16_t half : bits) {
      values.push_back(static_cast<float>(double_from_float16(half)));
    }
    return values;
  }
  values.resize(tensor.data.size() / sizeof(float));
  if (!values.empty()) {
    std::memcpy(values.data(), tensor.data.data(), values.size() * sizeof(float));
  }
  return values;
}

Observed observed(Session& session, std::int64_t index) {
  Observed found;
  found.index = index;
  const float* logits = session.logits();
  found.logits.assign(logits, logits + session.vocab_size());
  found.next_token = *session.next_tokens();
  const Snapshot snapshot = session.snapshot();
  const std::string prefix = "past_key_values.";
  for (const SnapshotTensor& tensor : snapshot.tensors) {
    if (tensor.name == "state") {
      found.state = floats_of(tensor);
    } else if (tensor.name.compare(0, prefix.size(), prefix) == 0) {
      // Session::snapshot() gives key and value of every layer in turn.
      const bool is_value = found.caches.size() % 2 == 1;
      Shape shape(tensor.shape.begin() + 1, tensor.shape.end());
      found.caches.push_back({tensor.name, is_value, std::move(shape), floats_of(tensor)});
    }
  }
  return found;
}

}  // namespace

const char* feed_name(Feed feed) noexcept {
  switch (feed) {
    case Feed::step:
      return "step";
    case Feed::prefill:
      return "prefill";
    case Feed::prefill_pass:
      break;
  }
  return "prefill_pass";
}

void replay(Session& session, const SelftestVectors& vectors, const Feeding& feeding,
            const std::function<void(Observed)>& look) {
  const std::vector<std::int64_t>& ids = vectors.input_ids();
  const auto rest = ids.begin() + vectors.prompt();
  const std::vector<std::int64_t> prompt(ids.begin(), rest);
  if (feeding.by == Feed::step) {
    for (const std::int64_t token : prompt) {
      session.step({token});
    }
  } else {
    PrefillOptions options;
    options.chunk = feeding.chunk;
    // Chunks need as many passes as they have tokens.
    options.passes = feeding.by == Feed::prefill ? feeding.passes : std::min(vectors.prompt(), feeding.chunk);
    session.prefill({prompt}, options);
  }
  look(observed(session, 0));
  for (std::int64_t index = 1; index <= feeding.steps; ++index) {
    session.step({*(rest + index - 1)});
    look(observed(session, index));
  }
}

std::string place(const SelftestVectors& vectors, std::int64_t index, const char* preposition) {
  return std::string(preposition) + (index == 0 ? " the prompt of " + std::to_string(vectors.prompt()) + " tokens"
                                                : " step " + std::to_string(index));
}

}  // namespace crt
