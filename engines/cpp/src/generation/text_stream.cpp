#include "crt_runtime/tokenizer.hpp"

#include <algorithm>

#include "generation/utf8.hpp"

namespace crt {
namespace {

constexpr std::int64_t kBytes = 256;

/// Only ids outside the byte range are silent: a model may use byte 0 to end a sequence and print it too.
std::vector<std::int64_t> silent_ids(const ModelConfig& config) {
  std::vector<std::int64_t> ids = config.eos_token_ids;
  if (config.bos_token_id.has_value()) ids.push_back(*config.bos_token_id);
  ids.erase(std::remove_if(ids.begin(), ids.end(), [](std::int64_t id) { return id < kBytes; }), ids.end());
  return ids;
}

/// Python holds two bytes of an encoded surrogate back, though they can become no character (its decoders can be asked
/// to let surrogates pass). So do we, so that both give out the same pieces.
bool begins_surrogate(const std::string& bytes) noexcept {
  return bytes.size() == 2 && bytes[0] == '\xED' && static_cast<unsigned char>(bytes[1]) >= 0xA0 &&
         static_cast<unsigned char>(bytes[1]) <= 0xBF;
}

/// Move what is decided out of bytes; at the end that is everything.
std::string take_characters(std::string& bytes, bool end) {
  std::string text;
  while (!bytes.empty()) {
    const Utf8Prefix prefix = first_character(bytes.data(), bytes.size());
    if (prefix.kind == Utf8Prefix::incomplete && !end) break;
    if (prefix.kind == Utf8Prefix::complete) {
      text.append(bytes, 0, prefix.length);
    } else {
      text += kReplacementCharacter;
    }
    bytes.erase(0, prefix.length);
  }
  return text;
}

}  // namespace

TextStream::TextStream(const ModelConfig& config) : silent_(silent_ids(config)) {}

std::string TextStream::push(std::int64_t token_id) {
  if (token_id < 0 || token_id >= kBytes) {
    const bool silent = std::find(silent_.begin(), silent_.end(), token_id) != silent_.end();
    return silent ? std::string() : finish() + kReplacementCharacter;
  }
  pending_ += static_cast<char>(static_cast<unsigned char>(token_id));
  return begins_surrogate(pending_) ? std::string() : take_characters(pending_, false);
}

std::string TextStream::finish() { return take_characters(pending_, true); }

}  // namespace crt
