#include "generation/row_text.hpp"

#include <algorithm>
#include <utility>

#include "session/history.hpp"

namespace crt {
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
