#include "crt_runtime/tokenizer.hpp"

#include <algorithm>

#include "crt_runtime/error.hpp"
#include "text/utf8.hpp"

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
    const Utf8Prefix prefix = first_character(bytes);
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

namespace {

void append_bytes(const std::string& text, std::vector<std::int64_t>& ids) {
  const std::size_t invalid = first_invalid_utf8(text);
  if (invalid != std::string::npos) {
    throw Error(ErrorKind::input, "the text is not valid UTF-8 at byte " + std::to_string(invalid) + " of " +
                                      std::to_string(text.size()) + "; give it in UTF-8");
  }
  for (const char byte : text) ids.push_back(static_cast<unsigned char>(byte));
}

}  // namespace

ByteTokenizer::ByteTokenizer(const ModelConfig& config) : config_(config) {
  if (config.tokenizer != "byte") {
    throw Error(ErrorKind::unsupported, "this model does not read bytes (config.json: tokenizer = " + config.tokenizer +
                                            "), and this library has no other tokenizer: give and take token ids");
  }
  if (config.vocab < kBytes) {
    throw Error(ErrorKind::bundle, "the byte tokenizer has " + std::to_string(kBytes) +
                                       " tokens, more than the model's vocab_size " + std::to_string(config.vocab));
  }
}

std::vector<std::int64_t> ByteTokenizer::encode(const std::string& text) const {
  std::vector<std::int64_t> ids;
  ids.reserve(text.size());
  append_bytes(text, ids);
  return ids;
}

std::vector<std::int64_t> ByteTokenizer::encode_prompt(const std::string& text) const {
  std::vector<std::int64_t> ids = encode(text);
  if (!config_.bos_token_id.has_value()) return ids;
  const std::int64_t bos = *config_.bos_token_id;
  const auto first = std::find_if(ids.begin(), ids.end(), [bos](std::int64_t id) { return id != bos; });
  ids.erase(ids.begin(), first);
  ids.insert(ids.begin(), bos);
  return ids;
}

std::string ByteTokenizer::decode(const std::vector<std::int64_t>& ids) const {
  TextStream decoder(config_);
  std::string text;
  for (const std::int64_t id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

TextStream ByteTokenizer::stream() const { return TextStream(config_); }

}  // namespace crt
