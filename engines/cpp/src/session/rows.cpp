#include "session/rows.hpp"

#include <algorithm>
#include <string>

#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {

void check_token_rows(const std::vector<std::vector<std::int64_t>>& rows, std::int64_t batch, std::int64_t vocab) {
  if (static_cast<std::int64_t>(rows.size()) != batch) {
    throw Error(ErrorKind::input, "expected one row of token ids per sequence: batch is " + std::to_string(batch) +
                                      ", found " + std::to_string(rows.size()) + " rows");
  }
  std::vector<std::string> problems;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto outside = std::find_if(rows[row].begin(), rows[row].end(),
                                      [vocab](std::int64_t token) { return token < 0 || token >= vocab; });
    if (outside != rows[row].end()) {
      problems.push_back("row " + std::to_string(row) + ": token id " + std::to_string(*outside) + " at index " +
                         std::to_string(outside - rows[row].begin()) + " is outside the vocabulary (0 to " +
                         std::to_string(vocab - 1) + ")");
    }
  }
  if (!problems.empty()) refuse_problems(ErrorKind::input, "token ids", problems);
}

void check_capacity(const std::vector<std::int64_t>& positions, const std::vector<std::int64_t>& lengths,
                    std::int64_t capacity) {
  std::vector<std::string> problems;
  for (std::size_t row = 0; row < positions.size(); ++row) {
    if (lengths[row] > capacity - positions[row]) {
      problems.push_back("row " + std::to_string(row) + ": " + std::to_string(positions[row]) +
                         " tokens in the cache and " + std::to_string(lengths[row]) +
                         " more exceed the capacity of " + std::to_string(capacity));
    }
  }
  if (!problems.empty()) refuse_problems(ErrorKind::input, "the cache is too small", problems);
}

void batches_from_lengths(const std::vector<std::int64_t>& positions, const std::vector<std::int64_t>& lengths,
                         std::int64_t capacity, bool rows_are_independent, bool pads, std::vector<Batch>& batches) {
  batches.clear();
  std::int64_t furthest = 0;  // largest position among the rows of the last batch
  for (std::size_t index = 0; index < lengths.size(); ++index) {
    if (lengths[index] == 0) continue;
    const auto row = static_cast<std::int64_t>(index);
    if (rows_are_independent && !batches.empty() && batches.back().stop == row &&
        (pads || batches.back().seq == lengths[index])) {
      // Padding is written to the cache as well, so no row of the batch may pass the capacity.
      const std::int64_t seq = std::max(batches.back().seq, lengths[index]);
      const std::int64_t position = std::max(furthest, positions[index]);
      if (position + seq <= capacity) {
        batches.back().stop = row + 1;
        batches.back().seq = seq;
        furthest = position;
        continue;
      }
    }
    batches.push_back(Batch{row, row + 1, lengths[index]});
    furthest = positions[index];
  }
}

}  // namespace crt
