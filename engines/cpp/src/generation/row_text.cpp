#include "generation/row_text.hpp"

#include <algorithm>
#include <utility>

#include "session/history.hpp"

namespace crt {
namespace {

// A token completes at most two characters' worth of text; held text grows by such pieces.
constexpr std::size_t kHeldPiece = 32;

}  // namespace

StopMatcher::StopMatcher(std::vector<std::string> stop_strings) : stops_(std::move(stop_strings)) {
  for (const std::string& stop : stops_) longest_ = std::max(longest_, stop.size());
  if (!stops_.empty()) held_.reserve(longest_ + kHeldPiece);
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

namespace {

bool begins_character(char byte) noexcept { return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U; }

std::int64_t characters(const std::string& text) noexcept {
  return static_cast<std::int64_t>(std::count_if(text.begin(), text.end(), begins_character));
}

// A byte that is no UTF-8 becomes the three bytes of U+FFFD, no token becomes more on average.
constexpr std::size_t kBytesPerToken = 3;
// Longer pieces come only where text held back for a stop string is let out.
constexpr std::size_t kPiece = 64;

}  // namespace

RowText::RowText(std::optional<TextStream> decoder, const std::vector<std::string>& stop_strings, std::size_t reserved)
    : decoder_(std::move(decoder)), stops_(stop_strings) {
  if (!decoder_.has_value()) return;
  text_.reserve(reserved * kBytesPerToken);
  piece_.reserve(kPiece);
}

void RowText::go_on(const std::int64_t* context, std::size_t count, std::int64_t held) {
  if (!decoder_.has_value()) return;
  std::string before;
  for (std::size_t index = 0; index < count; ++index) {
    before += context[index] == kTextEnd ? decoder_->finish() : decoder_->push(context[index]);
  }
  const std::int64_t given = characters(before) - held;
  std::size_t begin = 0;
  for (std::int64_t passed = 0; begin < before.size(); ++begin) {
    if (begins_character(before[begin]) && passed++ >= given) break;
  }
  carried_ = before.substr(begin);
}

void RowText::push(std::int64_t token) {
  if (!decoder_.has_value()) return;
  const std::size_t begin = text_.size();
  give_carried();
  stops_.push(decoder_->push(token), text_);
  keep_piece(begin);
}

void RowText::finish() {
  if (!decoder_.has_value() || stops_.found()) return;
  const std::size_t begin = text_.size();
  give_carried();
  stops_.push(decoder_->finish(), text_);
  stops_.finish(text_);
  keep_piece(begin);
}

std::string RowText::rest() const {
  if (!decoder_.has_value() || stops_.found()) return "";
  TextStream decoder = *decoder_;
  return stops_.before_a_stop(carried_ + stops_.held() + decoder.finish());
}

std::int64_t RowText::held() const noexcept { return characters(carried_) + characters(stops_.held()); }

void RowText::give_carried() {
  stops_.push(carried_, text_);
  carried_.clear();
}

void RowText::keep_piece(std::size_t begin) { piece_.append(text_, begin, std::string::npos); }

}  // namespace crt
