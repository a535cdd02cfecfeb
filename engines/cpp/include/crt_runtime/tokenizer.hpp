// Text to token ids and back for models that read bytes; other models are driven by token ids.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "crt_runtime/config.hpp"
#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// Turns ids into text as they arrive and never splits a UTF-8 character; invalid bytes become U+FFFD, one for each
/// maximal subpart of an ill-formed sequence (Unicode 15, section 3.9, as Python's incremental decoder does).
class TextStream {
 public:
  explicit TextStream(const ModelConfig& config);
  /// Text that this id completes; empty while a character is incomplete.
  std::string push(std::int64_t token_id);
  /// What is still held back.
  std::string finish();

 private:
  std::string pending_;
  std::vector<std::int64_t> silent_;
};

/// One id per UTF-8 byte (0..255); ids from 256 on belong to the model's special tokens.
class ByteTokenizer {
 public:
  /// Throws Error(unsupported) if the model's tokenizer is not "byte": use token ids.
  explicit ByteTokenizer(const ModelConfig& config);
  /// Bytes of the text; throws Error(input) if it is not valid UTF-8.
  std::vector<std::int64_t> encode(const std::string& text) const;
  /// bos_token_id, if the model has one, then the bytes; once, where the bytes begin with it too.
  std::vector<std::int64_t> encode_prompt(const std::string& text) const;
  std::string decode(const std::vector<std::int64_t>& ids) const;
  TextStream stream() const;

 private:
  ModelConfig config_;
};

}  // namespace crt
