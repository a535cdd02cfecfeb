// From logits to a token, by the specification in crt_export/runtime/sampling.py: the same tokens in both languages.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// How the next token is chosen. Order: repetition penalty, temperature, top-k, top-p, min-p; ties to the lower id.
struct SamplingOptions {
  double temperature = 0.0;         ///< 0 is greedy; above 0 divides the logits before the softmax
  std::int64_t top_k = 0;           ///< keep that many of the likeliest tokens; 0 keeps all
  double top_p = 1.0;               ///< keep the likeliest tokens that together reach this probability
  double min_p = 0.0;               ///< drop tokens less likely than this fraction of the likeliest
  double repetition_penalty = 1.0;  ///< above 1 makes tokens that the row has seen less likely
  std::uint32_t seed = 0;           ///< key of the random numbers

  bool greedy() const noexcept { return temperature == 0.0; }
  /// Throws Error(input) listing every value that is out of its range.
  void check() const;
};

/// Philox4x32-10: four random words for a counter and a key.
std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) noexcept;

/// Random number of one draw, [0, 1), from the top 53 bits of the first two words; counter (step low, step high, 0, 0).
double uniform(std::uint32_t seed, std::uint32_t row, std::uint64_t step) noexcept;

/// exp(x) for x <= 0 in IEEE double operations of a fixed order, so that every language gets the same bits.
double specified_exp(double x) noexcept;

/// Chooses tokens; keeps its scratch memory, so that choosing allocates nothing after construction.
class Sampler {
 public:
  explicit Sampler(std::size_t vocab);
  /// logits: float32 [vocab]; seen: uint8 [vocab], 1 for tokens the penalty applies to (nullptr: none);
  /// step: number of tokens that this row has drawn before. options must have passed check(). Throws Error(contract) if
  /// a logit is NaN or +inf, none is finite, or the penalty makes one infinite; Error(input) if vocab is 0.
  std::int64_t sample(const float* logits, const std::uint8_t* seen, const SamplingOptions& options, std::uint32_t row,
                      std::uint64_t step);

 private:
  /// Ids by falling value into ids_, top-k applied; how many.
  std::size_t rank(double largest, const SamplingOptions& options);
  /// Running sums of the weights into cumulative_; the last place that top-p and min-p keep.
  std::size_t accumulate(std::size_t kept, double largest, const SamplingOptions& options);

  std::vector<double> values_;      // by id: the logit after the penalty
  std::vector<std::int64_t> ids_;   // by rank
  std::vector<double> cumulative_;  // by rank
};

}  // namespace crt
