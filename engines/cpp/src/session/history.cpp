#include "session/history.hpp"

#include <algorithm>
#include <utility>

#include "crt_runtime/session.hpp"

namespace crt {

History::History(std::int64_t batch, std::int64_t vocab)
    : vocab_(static_cast<std::size_t>(vocab)),
      drawn_(static_cast<std::size_t>(batch), 0),
      pending_(static_cast<std::size_t>(batch), kNoToken),
      seen_(static_cast<std::size_t>(batch) * vocab_, 0),
      recent_(static_cast<std::size_t>(batch) * kRecentTokens, kTextEnd),
      held_(static_cast<std::size_t>(batch), 0) {}

void History::feed(std::int64_t row, const std::int64_t* tokens, std::size_t count) noexcept {
  if (count == 0) return;
  std::uint8_t* seen = seen_.data() + offset(row);
  for (std::size_t index = 0; index < count; ++index) seen[static_cast<std::size_t>(tokens[index])] = 1;
  const auto index = static_cast<std::size_t>(row);
  if (count > 1 || tokens[0] != pending_[index]) held_[index] = 0;
  pending_[index] = kNoToken;
  remember(row, tokens, count);
}

void History::draw(std::int64_t row, std::int64_t token, bool keep) noexcept {
  ++drawn_[static_cast<std::size_t>(row)];
  if (!keep) {
    held_[static_cast<std::size_t>(row)] = 0;
    remember(row, &kTextEnd, 1);
    return;
  }
  seen_[offset(row) + static_cast<std::size_t>(token)] = 1;
  pending_[static_cast<std::size_t>(row)] = token;
}

void History::clear() noexcept {
  std::fill(drawn_.begin(), drawn_.end(), 0);
  std::fill(pending_.begin(), pending_.end(), kNoToken);
  std::fill(seen_.begin(), seen_.end(), std::uint8_t{0});
  std::fill(recent_.begin(), recent_.end(), kTextEnd);
  std::fill(held_.begin(), held_.end(), 0);
}

void History::assign(std::vector<std::int64_t> drawn, std::vector<std::int64_t> pending, std::vector<std::uint8_t> seen,
                     std::vector<std::int64_t> recent, std::vector<std::int64_t> held) noexcept {
  drawn_ = std::move(drawn);
  pending_ = std::move(pending);
  seen_ = std::move(seen);
  recent_ = std::move(recent);
  held_ = std::move(held);
}

/// Newest last: what is older moves to the front and out.
void History::remember(std::int64_t row, const std::int64_t* tokens, std::size_t count) noexcept {
  std::int64_t* kept = recent_.data() + recent_offset(row);
  const std::size_t fresh = std::min(count, kRecentTokens);
  std::copy(kept + fresh, kept + kRecentTokens, kept);
  std::copy(tokens + (count - fresh), tokens + count, kept + (kRecentTokens - fresh));
}

}  // namespace crt
