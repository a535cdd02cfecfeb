#include "crt_runtime/tokenizer.hpp"

#include <algorithm>

#include "crt_runtime/error.hpp"
#include "generation/utf8.hpp"

namespace crt {
namespace {

constexpr std::int64_t kBytes = 256;

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
