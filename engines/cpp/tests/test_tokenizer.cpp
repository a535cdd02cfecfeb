// UTF-8 as Python's incremental decoder with errors="replace" gives it (validate/cpp compares the two at random).
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "crt_runtime/error.hpp"
#include "crt_runtime/tokenizer.hpp"

namespace {

const std::string kReplaced = "\xEF\xBF\xBD";

crt::ModelConfig byte_model() {
  crt::ModelConfig config;
  config.vocab = 259;
  config.bos_token_id = 256;
  config.eos_token_ids = {257};
  config.tokenizer = "byte";
  return config;
}

std::vector<std::int64_t> ids_of(const std::string& bytes) {
  std::vector<std::int64_t> ids;
  for (const char byte : bytes) ids.push_back(static_cast<unsigned char>(byte));
  return ids;
}

std::string decoded(const std::string& bytes) { return crt::ByteTokenizer(byte_model()).decode(ids_of(bytes)); }

std::string repeated(const std::string& text, int times) {
  std::string all;
  for (int time = 0; time < times; ++time) all += text;
  return all;
}

}  // namespace

TEST_CASE("decode: the first and last character of every length come through") {
  for (const char* text : {"A", "\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80",
                           "\xEF\xBF\xBF", "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF"}) {
    CHECK(decoded(text) == text);
  }
  CHECK(decoded(std::string(1, '\0')) == std::string(1, '\0'));
}

TEST_CASE("decode: one U+FFFD for each maximal subpart of what is not UTF-8") {
  struct Case {
    const char* bytes;
    int replaced;
  };
  const std::vector<Case> cases = {
      {"\x80", 1},              // continuation alone
      {"\xBF\xBF", 2},          //
      {"\xC0\xAF", 2},          // overlong
      {"\xC1\xBF", 2},          //
      {"\xE0\x80\xAF", 3},      // overlong
      {"\xE0\x9F\xBF", 3},      //
      {"\xF0\x80\x80\xAF", 4},  // overlong
      {"\xF0\x8F\xBF\xBF", 4},  //
      {"\xED\xA0\x80", 3},      // surrogates
      {"\xED\xBF\xBF", 3},      //
      {"\xF4\x90\x80\x80", 4},  // beyond U+10FFFF
      {"\xF5\x80\x80\x80", 4},  //
      {"\xFF", 1},              //
      {"\xC2", 1},              // cut off at the end
      {"\xE2\x82", 1},          //
      {"\xF0\x9F\x98", 1},      //
      {"\xED\xA0", 2},          //
  };
  for (const Case& each : cases) {
    CHECK(decoded(each.bytes) == repeated(kReplaced, each.replaced));
    CHECK(decoded(std::string(each.bytes) + "A") == repeated(kReplaced, each.replaced) + "A");
  }
  CHECK(decoded("\xE2\x82\xE2\x82\xAC") == kReplaced + "\xE2\x82\xAC");
  CHECK(decoded("\xF0\x9F\x98\xC3\xA9") == kReplaced + "\xC3\xA9");
}

TEST_CASE("stream: a piece comes when its character is complete, and never half of one") {
  crt::TextStream stream = crt::ByteTokenizer(byte_model()).stream();
  CHECK(stream.push(0xF0) == "");
  CHECK(stream.push(0x9F) == "");
  CHECK(stream.push(0x98) == "");
  CHECK(stream.push(0x80) == "\xF0\x9F\x98\x80");
  CHECK(stream.push(0xE2) == "");
  CHECK(stream.push('x') == kReplaced + "x");
  CHECK(stream.push(0xE2) == "");
  CHECK(stream.finish() == kReplaced);
  CHECK(stream.finish() == "");
}

TEST_CASE("stream: special tokens are silent and do not break a character, unknown ids become U+FFFD") {
  crt::TextStream stream = crt::ByteTokenizer(byte_model()).stream();
  CHECK(stream.push(0xC3) == "");
  CHECK(stream.push(257) == "");
  CHECK(stream.push(0xA9) == "\xC3\xA9");
  CHECK(stream.push(0xC3) == "");
  CHECK(stream.push(258) == kReplaced + kReplaced);
  CHECK(stream.push(-1) == kReplaced);
  crt::ModelConfig zero = byte_model();
  zero.eos_token_ids = {0, 258};
  CHECK(crt::ByteTokenizer(zero).decode({258, 0}) == std::string(1, '\0'));
}

TEST_CASE("encode: the bytes of the text, bos before a prompt, invalid UTF-8 refused with its place") {
  const crt::ByteTokenizer tokenizer(byte_model());
  CHECK(tokenizer.encode("") == std::vector<std::int64_t>{});
  CHECK(tokenizer.encode("a\xC3\xA9") == std::vector<std::int64_t>{97, 0xC3, 0xA9});
  CHECK(tokenizer.encode_prompt("a") == std::vector<std::int64_t>{256, 97});
  crt::ModelConfig line = byte_model();
  line.bos_token_id = '\n';
  CHECK(crt::ByteTokenizer(line).encode_prompt("a\n") == std::vector<std::int64_t>{'\n', 'a', '\n'});
  CHECK(crt::ByteTokenizer(line).encode_prompt("\n\na") == std::vector<std::int64_t>{'\n', 'a'});
  CHECK(crt::ByteTokenizer(line).encode_prompt("") == std::vector<std::int64_t>{'\n'});
  crt::ModelConfig without = byte_model();
  without.bos_token_id.reset();
  CHECK(crt::ByteTokenizer(without).encode_prompt("a") == std::vector<std::int64_t>{97});
  for (const char* text : {"ab\xC3", "ab\xED\xA0\x80", "ab\xFFz", "ab\xC0\x80"}) {
    CHECK_THROWS_WITH_AS(tokenizer.encode(text), doctest::Contains("at byte 2"), crt::Error);
  }
}

TEST_CASE("tokenizers other than byte are unsupported, a vocabulary too small for bytes is refused") {
  crt::ModelConfig config = byte_model();
  for (const char* name : {"none", "tokenizer.json"}) {
    config.tokenizer = name;
    CHECK_THROWS_WITH_AS(crt::ByteTokenizer{config}, doctest::Contains(name), crt::Error);
  }
  config = byte_model();
  config.vocab = 255;
  CHECK_THROWS_AS(crt::ByteTokenizer{config}, crt::Error);
}
