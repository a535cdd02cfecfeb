#include "generation/row_text.hpp"

#include <utility>

namespace crt {
namespace {

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

void RowText::push(std::int64_t token) {
  if (!decoder_.has_value()) return;
  const std::size_t begin = text_.size();
  stops_.push(decoder_->push(token), text_);
  keep_piece(begin);
}

void RowText::finish() {
  if (!decoder_.has_value() || stops_.found()) return;
  const std::size_t begin = text_.size();
  stops_.push(decoder_->finish(), text_);
  stops_.finish(text_);
  keep_piece(begin);
}

void RowText::keep_piece(std::size_t begin) { piece_.append(text_, begin, std::string::npos); }

}  // namespace crt
