// A model small enough to compute by hand, on an engine that can be told to fail: for what no real graph does on demand.
//
// One layer of one head. A token t at position p writes the key (t + 1, p) and the value (t + 1, t), and makes the state
// h / 2 + t + 1. The likeliest next token is (sum of the key's first channel up to p + whole part of h) mod vocab.
// Padding writes NaN into the caches, as a real graph may.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "session/decoder.hpp"

namespace crt_test {

/// What happened, and what shall happen; shared by an engine, its buffers and its launches.
struct ToyControl {
  bool host_memory = true;
  std::int64_t max_tokens = 16;
  int writes = 0;                    ///< uploads of int64 tensors
  int runs = 0;                      ///< launches that ran
  int passes = 0;                    ///< of these, through prefill_pass
  bool one_graph = false;            ///< prefill_pass makes steps too, and there is no other
  std::int64_t overflowing = -1;     ///< a token whose state is infinite
  std::int64_t spoiled_logits = -1;  ///< a token whose logits hold a NaN
  bool failing = false;              ///< the next launch throws
  std::string state = "hidden";      ///< what the model's state is called
  std::deque<float> residuals;       ///< of the next passes over a row; 0 where there are none left
};

inline constexpr std::int64_t kToyVocab = 11;
inline constexpr std::int64_t kToyHidden = 3;

std::shared_ptr<crt::Engine> make_toy_engine(std::shared_ptr<ToyControl> control);

/// A session's setup on the toy model.
crt::SessionSetup toy_setup(std::int64_t batch, std::int64_t capacity);

std::vector<float> floats_of(const std::vector<unsigned char>& bytes);

/// A prefill of that many passes.
inline crt::PrefillRule by_passes(std::int64_t passes, std::int64_t chunk) {
  crt::PrefillRule rule;
  rule.passes = passes;
  rule.chunk = chunk;
  return rule;
}

/// One row computed by hand.
struct ToyRow {
  double state = 0.0;
  std::vector<double> keys;
  void feed(const std::vector<std::int64_t>& tokens);
  std::int64_t next_token() const;
};

}  // namespace crt_test
