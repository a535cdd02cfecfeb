// Rows of a batch: which tokens each brings, and which neighbours can share one call of the engine.
// The C++ twin of crt_export/runtime/rows.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace crt {

/// Neighbouring rows start to stop that run in one call, right-padded to seq tokens.
struct Batch {
  std::int64_t start = 0;
  std::int64_t stop = 0;
  std::int64_t seq = 0;
};

/// Tokens of one row; the memory belongs to the caller.
struct RowTokens {
  const std::int64_t* tokens = nullptr;
  std::int64_t count = 0;
};

/// Throws Error(input) listing every problem: not batch rows, or ids outside the vocabulary.
void check_token_rows(const std::vector<std::vector<std::int64_t>>& rows, std::int64_t batch, std::int64_t vocab);

/// Throws Error(input) if a row's new tokens do not fit behind those already in the cache; lists every such row.
void check_capacity(const std::vector<std::int64_t>& positions, const std::vector<std::int64_t>& lengths,
                    std::int64_t capacity);

/// Join neighbouring rows with tokens, as long as the padding fits behind every one of them; rows without tokens take
/// no part. Without rows_are_independent each row runs alone. Without pads only rows of equally many tokens join:
/// padding changes the shape of every product and the order of sums, so a row would have other bits than alone. Fills
/// batches, and allocates nothing if its capacity is the batch.
void batches_from_lengths(const std::vector<std::int64_t>& positions, const std::vector<std::int64_t>& lengths,
                         std::int64_t capacity, bool rows_are_independent, bool pads, std::vector<Batch>& batches);

}  // namespace crt
