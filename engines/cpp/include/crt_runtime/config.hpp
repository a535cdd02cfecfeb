// The part of a model's configuration that running it needs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace crt {

/// Read from "config" of manifest.json; sizes are counted in elements.
struct ModelConfig {
  bool recurrent = true;  ///< false for a plain transformer: no state, no residual
  std::int64_t vocab = 0;
  std::int64_t hidden = 0;
  std::int64_t layers = 0;
  std::int64_t heads = 0;
  std::int64_t head_dim = 0;
  std::int64_t max_position_embeddings = 0;
  double rope_theta = 10000.0;
  bool rope_interleaved = true;                ///< pairs (2j, 2j+1); false: (j, j + head_dim / 2)
  std::optional<std::int64_t> sliding_window;  ///< keys a query sees, itself included
  std::optional<std::int64_t> bos_token_id;    ///< every sequence begins with it, once
  std::vector<std::int64_t> eos_token_ids;     ///< each of them ends a sequence
  std::string tokenizer;  ///< "byte", "tokenizer.json" or "none"
};

}  // namespace crt
