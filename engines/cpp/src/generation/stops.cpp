#include "generation/stops.hpp"

#include <algorithm>
#include <utility>

namespace crt {
namespace {

// A token completes at most two characters' worth of text; held text grows by such pieces.
constexpr std::size_t kPiece = 32;

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stop_strings) : stops_(std::move(stop_strings)) {
  for (const std::string& stop : stops_) longest_ = std::max(longest_, stop.size());
  if (!stops_.empty()) held_.reserve(longest_ + kPiece);
}

void StopMatcher::push(const std::string& text, std::string& out) {
  if (found_) return;
  if (stops_.empty()) {
    out += text;
    return;
  }
  // What is held back begins a stop string as early as one can begin, so none is missed.
  held_ += text;
  std::size_t end = std::string::npos;
  std::size_t begin = 0;
  for (const std::string& stop : stops_) {
    const std::size_t place = held_.find(stop);
    if (place == std::string::npos) continue;
    const std::size_t stop_end = place + stop.size();
    if (stop_end < end || (stop_end == end && place < begin)) {
      end = stop_end;
      begin = place;
    }
  }
  found_ = end != std::string::npos;
  const std::size_t certain = found_ ? begin : held_.size() - beginning_of_a_stop();
  out.append(held_, 0, certain);
  held_.erase(0, found_ ? held_.size() : certain);
}

void StopMatcher::finish(std::string& out) {
  out += held_;
  held_.clear();
}

std::string StopMatcher::before_a_stop(const std::string& text) const {
  StopMatcher matcher(stops_);
  std::string before;
  matcher.push(text, before);
  matcher.finish(before);
  return before;
}

std::size_t StopMatcher::beginning_of_a_stop() const noexcept {
  for (std::size_t length = std::min(longest_ - 1, held_.size()); length > 0; --length) {
    const std::size_t begin = held_.size() - length;
    for (const std::string& stop : stops_) {
      if (length < stop.size() && held_.compare(begin, length, stop, 0, length) == 0) return length;
    }
  }
  return 0;
}

}  // namespace crt
