// A model as whoever runs it needs to know it: section "model" of manifest.json.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// A tensor, float32, that every token hands to the next one; zeros before the first.
struct StateSpec {
  std::string name;                 ///< "hidden" is the state that the head reads
  std::vector<std::int64_t> shape;  ///< dims per token
};

/// How the keys of a cache are turned by their position.
struct Rotary {
  bool interleaved = true;          ///< pairs (2j, 2j+1); false: (j, j + head_dim / 2)
  std::vector<double> frequencies;  ///< radians per position of each pair, [head_dim / 2]
};

/// Keys and values that later tokens read.
struct CacheSpec {
  std::string name;  ///< for messages; graphs number the caches
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::optional<std::int64_t> window;  ///< latest tokens that a query sees, itself included; unset: all
  std::optional<std::size_t> rotary;   ///< index of ModelConfig::rotaries; unset: its keys are not turned
};

/// Sizes are counted in elements.
struct ModelConfig {
  std::string architecture;  ///< for messages
  std::int64_t vocab = 0;
  std::int64_t hidden = 0;  ///< size of what the head reads
  std::int64_t max_position_embeddings = 0;
  std::string tokenizer;                     ///< "byte", "tokenizer.json" or "none"
  std::optional<std::int64_t> bos_token_id;  ///< every sequence begins with it, once
  std::vector<std::int64_t> eos_token_ids;   ///< each of them ends a sequence
  std::vector<StateSpec> states;
  std::vector<CacheSpec> caches;  ///< in the order in which graphs number them
  std::vector<Rotary> rotaries;
  std::int64_t passes = 1;  ///< passes over a chunk that it was trained for
  bool iterated = false;    ///< whether a chunk takes several passes, each fed the states of the one before
  bool relative = true;     ///< whether what caches hold may move to earlier positions

  /// Latest tokens that any cache shows to the next one, itself included: what a full row has to keep. Unset where rows
  /// cannot move: a cache shows all tokens, or they know where they stand.
  std::optional<std::int64_t> window() const;
};

}  // namespace crt
