// The C API on a real bundle: the same numbers and tokens as the C++ API, ownership, refusals.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include "c_api_calls.hpp"
#include "crt_runtime/crt.h"
#include "crt_runtime/crt_runtime.hpp"
#include "given_folder.hpp"

namespace {

using crt_test::error_names;
using crt_test::initialised;
using crt_test::warm;

/// An open bundle and a session of one row on it.
struct Opened {
  explicit Opened(const char* folder) {
    auto bundle_options = initialised(crt_bundle_options_init);
    bundle_options.allow_unvalidated = 1;
    auto session_options = initialised(crt_session_options_init);
    session_options.threads = 1;
    REQUIRE(crt_bundle_open(folder, &bundle_options, &bundle) == CRT_OK);
    REQUIRE(crt_session_open(bundle, nullptr, &session_options, &session) == CRT_OK);
  }
  ~Opened() {
    crt_session_close(session);
    crt_bundle_close(bundle);
  }
  Opened(const Opened&) = delete;
  Opened& operator=(const Opened&) = delete;

  crt_bundle* bundle = nullptr;
  crt_session* session = nullptr;
};

const std::vector<std::int64_t> kPrompt = {10, 20, 30};

/// Generate from a prompt (nullptr: go on) to the end; the tokens of row 0.
std::vector<std::int64_t> generated(crt_session* session, const std::vector<std::int64_t>* prompt,
                                    const crt_generation_options& options) {
  crt_generation* generation = nullptr;
  const std::int64_t length = prompt == nullptr ? 0 : static_cast<std::int64_t>(prompt->size());
  REQUIRE(crt_session_generate(session, prompt == nullptr ? nullptr : prompt->data(), &length, 1, &options,
                               &generation) == CRT_OK);
  std::int64_t token = 0;
  std::int32_t more = 1;
  while (more != 0) REQUIRE(crt_generation_next(generation, &token, 1, &more) == CRT_OK);
  CHECK(token == CRT_NO_TOKEN);
  const std::int64_t* tokens = nullptr;
  std::size_t count = 0;
  REQUIRE(crt_generation_tokens(generation, 0, &tokens, &count) == CRT_OK);
  const std::vector<std::int64_t> result(tokens, tokens + count);
  crt_generation_free(generation);
  return result;
}

crt_generation_options generation_options(std::int64_t tokens, const crt_sampling_options* sampling) {
  auto options = initialised(crt_generation_options_init);
  options.max_new_tokens = tokens;
  options.ignore_eos = 1;
  options.sampling = sampling;
  return options;
}

}  // namespace

TEST_CASE("C API: what the bundle and the session say about themselves") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  const crt::Bundle expected = crt::Bundle::load(folder, true);
  const char* text = nullptr;
  CHECK(crt_bundle_identity(opened.bundle, &text) == CRT_OK);
  CHECK(text == expected.identity());
  std::size_t count = 0;
  CHECK(crt_bundle_target_count(opened.bundle, &count) == CRT_OK);
  CHECK(count == expected.targets().size());
  CHECK(crt_bundle_target(opened.bundle, 0, &text) == CRT_OK);
  CHECK(text == expected.targets()[0]);
  CHECK(crt_bundle_target(opened.bundle, count, &text) == CRT_ERROR_INPUT);
  CHECK(crt_bundle_default_target(opened.bundle, &text) == CRT_OK);
  CHECK(text == expected.default_target());
  CHECK(crt_session_target(opened.session, &text) == CRT_OK);
  CHECK(text == expected.default_target());
  auto config = initialised(crt_model_config_init);
  CHECK(crt_bundle_config(opened.bundle, &config) == CRT_OK);
  CHECK(config.vocab == expected.config().vocab);
  CHECK(std::vector<std::int64_t>(config.eos_token_ids, config.eos_token_ids + config.eos_token_count) ==
        expected.config().eos_token_ids);
  CHECK(config.tokenizer == expected.config().tokenizer);
  CHECK(config.iterated == (expected.config().iterated ? 1 : 0));
  CHECK(config.passes == expected.config().passes);
  const std::vector<crt::StateSpec>& states = expected.config().states;
  CHECK((crt_state_count(opened.bundle, &count) == CRT_OK && count == states.size()));
  CHECK(crt_state_name(opened.bundle, count, &text) == CRT_ERROR_INPUT);
  const std::int64_t* shape = nullptr;
  for (std::size_t index = 0; index < states.size(); ++index) {
    CHECK((crt_state_name(opened.bundle, index, &text) == CRT_OK && text == states[index].name));
    CHECK(crt_state_shape(opened.bundle, index, &shape, &count) == CRT_OK);
    CHECK(std::vector<std::int64_t>(shape, shape + count) == states[index].shape);
  }
  config.struct_size = 4;
  CHECK(crt_bundle_config(opened.bundle, &config) == CRT_ERROR_INPUT);
  std::int64_t number = 0;
  CHECK(crt_session_batch(opened.session, &number) == CRT_OK);
  CHECK(number == 1);
  CHECK(crt_session_vocab_size(opened.session, &number) == CRT_OK);
  CHECK(number == expected.config().vocab);
  CHECK(crt_session_capacity(opened.session, &number) == CRT_OK);
  CHECK(number > 0);
}

TEST_CASE("C API: text to ids and back, with the length asked for first") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  auto config = initialised(crt_model_config_init);
  REQUIRE(crt_bundle_config(opened.bundle, &config) == CRT_OK);
  std::size_t count = 0;
  if (std::string(config.tokenizer) != "byte") {
    CHECK(crt_encode(opened.bundle, "a", 1, 0, nullptr, 0, &count) == CRT_ERROR_UNSUPPORTED);
    return;
  }
  const std::string text("a\0\xC3\xA9", 4);
  CHECK(crt_encode(opened.bundle, text.data(), text.size(), 0, nullptr, 0, &count) == CRT_OK);
  REQUIRE(count == 4);
  std::vector<std::int64_t> ids(4, -7);
  CHECK(crt_encode(opened.bundle, text.data(), text.size(), 0, ids.data(), 3, &count) == CRT_ERROR_INPUT);
  CHECK(ids == std::vector<std::int64_t>(4, -7));
  CHECK(crt_encode(opened.bundle, text.data(), text.size(), 0, ids.data(), 4, &count) == CRT_OK);
  CHECK(ids == std::vector<std::int64_t>{'a', 0, 0xC3, 0xA9});
  CHECK(crt_encode(opened.bundle, text.data(), text.size(), 1, nullptr, 0, &count) == CRT_OK);
  CHECK(count == (config.bos_token_id == CRT_NO_TOKEN ? 4U : 5U));
  CHECK(crt_encode(opened.bundle, "\xFF", 1, 0, nullptr, 0, &count) == CRT_ERROR_INPUT);
  std::size_t bytes = 0;
  CHECK(crt_decode(opened.bundle, ids.data(), 4, nullptr, 0, &bytes) == CRT_OK);
  CHECK(bytes == 4);
  std::string back(5, '?');
  CHECK(crt_decode(opened.bundle, ids.data(), 4, back.data(), 4, &bytes) == CRT_ERROR_INPUT);
  CHECK(crt_decode(opened.bundle, ids.data(), 4, back.data(), 5, &bytes) == CRT_OK);
  CHECK(back == text + '\0');
  crt_text_stream* stream = nullptr;
  REQUIRE(crt_text_stream_new(opened.bundle, &stream) == CRT_OK);
  const char* piece = nullptr;
  CHECK(crt_text_stream_push(stream, 0xC3, &piece, &bytes) == CRT_OK);
  CHECK(bytes == 0);
  CHECK(crt_text_stream_push(stream, 0xA9, &piece, &bytes) == CRT_OK);
  CHECK(std::string(piece, bytes) == "\xC3\xA9");
  CHECK(crt_text_stream_finish(stream, &piece, &bytes) == CRT_OK);
  CHECK(bytes == 0);
  crt_text_stream_free(stream);
}

TEST_CASE("C API: prefill, step and advance give what the C++ session gives") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  crt::Bundle bundle = crt::Bundle::load(folder, true);
  crt::SessionOptions session_options;
  session_options.threads = 1;
  crt::Session expected = bundle.session(bundle.default_target(), session_options);
  const auto vocab = static_cast<std::size_t>(expected.vocab_size());
  const auto same = [vocab](const float* left, const float* right) {
    return std::memcmp(left, right, vocab * sizeof(float)) == 0;
  };
  const std::int64_t length = 3;
  const float* logits = nullptr;
  CHECK(crt_session_prefill(opened.session, kPrompt.data(), &length, 1, nullptr, &logits) == CRT_OK);
  CHECK(same(logits, expected.prefill({kPrompt})));
  const std::int64_t* next = nullptr;
  CHECK(crt_session_next_tokens(opened.session, &next) == CRT_OK);
  CHECK(next[0] == expected.next_tokens()[0]);
  const std::int64_t token = next[0];
  CHECK(crt_session_step(opened.session, &token, 1, &logits) == CRT_OK);
  CHECK(same(logits, expected.step({token})));
  CHECK(crt_session_advance(opened.session, &token, 1) == CRT_OK);
  CHECK(crt_session_logits(opened.session, &logits) == CRT_OK);
  CHECK(same(logits, expected.step({token})));
  const std::int64_t* position = nullptr;
  CHECK(crt_session_position(opened.session, &position) == CRT_OK);
  CHECK(position[0] == 5);
  CHECK(crt_session_step(opened.session, &token, 2, nullptr) == CRT_ERROR_INPUT);
  const std::int64_t negative = -1;
  CHECK(crt_session_prefill(opened.session, kPrompt.data(), &negative, 1, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(error_names("row 0: length -1"));
  CHECK(crt_session_prefill(opened.session, nullptr, &length, 1, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_reset(opened.session) == CRT_OK);
  CHECK(crt_session_position(opened.session, &position) == CRT_OK);
  CHECK(position[0] == 0);
}

TEST_CASE("C API: a generation goes on after a fork, a snapshot file, and the closing of its session") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  const crt_sampling_options sampling = warm();
  auto whole = generated(opened.session, &kPrompt, generation_options(9, &sampling));
  REQUIRE(crt_session_reset(opened.session) == CRT_OK);
  auto tokens = generated(opened.session, &kPrompt, generation_options(4, &sampling));
  CHECK(tokens == std::vector<std::int64_t>(whole.begin(), whole.begin() + 4));
  const std::vector<std::int64_t> rest(whole.begin() + 4, whole.end());

  crt_session* fork = nullptr;
  REQUIRE(crt_session_fork(opened.session, &fork) == CRT_OK);
  const auto path = std::filesystem::temp_directory_path() / "crt_test_c_api.snapshot";
  crt_snapshot* snapshot = nullptr;
  REQUIRE(crt_session_snapshot(opened.session, &snapshot) == CRT_OK);
  CHECK(crt_snapshot_save(snapshot, path.string().c_str()) == CRT_OK);
  crt_snapshot_free(snapshot);
  REQUIRE(crt_snapshot_load(path.string().c_str(), &snapshot) == CRT_OK);
  std::filesystem::remove(path);
  CHECK(generated(opened.session, nullptr, generation_options(5, &sampling)) == rest);
  CHECK(generated(fork, nullptr, generation_options(5, &sampling)) == rest);
  REQUIRE(crt_session_restore(fork, snapshot) == CRT_OK);
  crt_snapshot_free(snapshot);

  crt_generation* generation = nullptr;
  const auto options = generation_options(5, &sampling);
  REQUIRE(crt_session_generate(fork, nullptr, nullptr, 0, &options, &generation) == CRT_OK);
  crt_session_close(fork);
  std::int64_t token = 0;
  std::int32_t more = 0;
  CHECK(crt_generation_next(generation, &token, 1, &more) == CRT_OK);
  CHECK(more == 1);
  CHECK(token == rest[0]);
  CHECK(crt_generation_next(generation, &token, 2, &more) == CRT_ERROR_INPUT);
  crt_generation_free(generation);
}

TEST_CASE("C API: callback, stop reason, text and piece of a generation") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  struct Seen {
    std::vector<std::int64_t> tokens;
    std::string text;
  } seen;
  auto options = generation_options(9, nullptr);
  options.user = &seen;
  options.callback = [](void* user, std::int64_t row, std::int64_t token, const char* text, std::size_t bytes) {
    Seen& all = *static_cast<Seen*>(user);
    CHECK(row == 0);
    all.tokens.push_back(token);
    all.text.append(text, bytes);
    return static_cast<std::int32_t>(all.tokens.size() < 3 ? 1 : 0);
  };
  crt_generation* generation = nullptr;
  const std::int64_t length = 3;
  REQUIRE(crt_session_generate(opened.session, kPrompt.data(), &length, 1, &options, &generation) == CRT_OK);
  std::int64_t token = 0;
  std::int32_t more = 1;
  std::string pieces;
  const char* text = nullptr;
  std::size_t bytes = 0;
  crt_stop_reason reason = CRT_STOP_TOKEN;
  CHECK(crt_generation_stop_reason(generation, 0, &reason) == CRT_OK);
  CHECK(reason == CRT_STOP_RUNNING);
  std::vector<std::int64_t> tokens;
  while (crt_generation_next(generation, &token, 1, &more) == CRT_OK && more != 0) {
    tokens.push_back(token);
    CHECK(crt_generation_piece(generation, 0, &text, &bytes) == CRT_OK);
    pieces.append(text, bytes);
  }
  CHECK(tokens == seen.tokens);
  CHECK(tokens.size() == 3);
  CHECK(crt_generation_text(generation, 0, &text, &bytes) == CRT_OK);
  CHECK(std::string(text, bytes) == pieces);
  CHECK(pieces == seen.text);
  CHECK(crt_generation_rest(generation, 0, &text, &bytes) == CRT_OK);
  CHECK(std::string(text, bytes) == std::string(text));
  CHECK(crt_generation_rest(generation, 1, &text, &bytes) == CRT_ERROR_INPUT);
  CHECK(crt_generation_stop_reason(generation, 0, &reason) == CRT_OK);
  CHECK(reason == CRT_STOP_CALLBACK);
  CHECK(std::string(crt_stop_reason_name(reason)) == "callback");
  CHECK(crt_generation_text(generation, 1, &text, &bytes) == CRT_ERROR_INPUT);
  CHECK(error_names("row 1 is outside the batch"));
  crt_generation_free(generation);
}

TEST_CASE("C API: wrong options of a session and of a generation") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  auto session_options = initialised(crt_session_options_init);
  session_options.on_full = 7;
  crt_session* session = nullptr;
  CHECK(crt_session_open(opened.bundle, nullptr, &session_options, &session) == CRT_ERROR_INPUT);
  CHECK(error_names("on_full"));
  CHECK(crt_session_open(opened.bundle, "no-such-target", nullptr, &session) == CRT_ERROR_INPUT);
  CHECK(session == nullptr);
  auto options = generation_options(4, nullptr);
  options.stop_token_count = 1;
  crt_generation* generation = nullptr;
  const std::int64_t length = 3;
  const auto attempt = [&] {
    return crt_session_generate(opened.session, kPrompt.data(), &length, 1, &options, &generation);
  };
  CHECK(attempt() == CRT_ERROR_INPUT);
  CHECK(error_names("stop_tokens must not be NULL"));
  options = generation_options(4, nullptr);
  const char* strings[] = {nullptr};
  options.stop_strings = strings;
  options.stop_string_count = 1;
  CHECK(attempt() == CRT_ERROR_INPUT);
  options = generation_options(0, nullptr);
  CHECK(attempt() == CRT_ERROR_INPUT);
  CHECK(error_names("max_new_tokens"));
  CHECK(generation == nullptr);
}

TEST_CASE("C API: the number of rows and their lengths are judged before ids or lengths are read") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  const auto options = generation_options(1, nullptr);
  crt_generation* generation = nullptr;
  const auto refused_by_both = [&](const std::int64_t* lengths, std::size_t rows, const char* text) {
    CHECK(crt_session_prefill(opened.session, kPrompt.data(), lengths, rows, nullptr, nullptr) == CRT_ERROR_INPUT);
    CHECK_MESSAGE(error_names(text), std::string(crt_last_error()));
    CHECK(crt_session_generate(opened.session, kPrompt.data(), lengths, rows, &options, &generation) ==
          CRT_ERROR_INPUT);
    CHECK_MESSAGE(error_names(text), std::string(crt_last_error()));
  };
  // The second length is what lies behind the caller's array of one: it must not be looked at.
  const std::int64_t lengths[] = {3, -5};
  refused_by_both(lengths, 2, "expected one row of token ids per sequence: batch is 1, found 2 rows");
  refused_by_both(lengths, std::size_t{1} << 60U, "batch is 1, found 1152921504606846976 rows");
  std::int64_t capacity = 0;
  REQUIRE(crt_session_capacity(opened.session, &capacity) == CRT_OK);
  for (const std::int64_t length : {capacity + 1, std::numeric_limits<std::int64_t>::max()}) {
    refused_by_both(&length, 1, (std::to_string(length) + " more exceed the capacity of ").c_str());
  }
  CHECK(crt_session_prefill(opened.session, kPrompt.data(), nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(error_names("batch is 1, found 0 rows"));
  CHECK(generation == nullptr);
}

TEST_CASE("C API: a session that slides takes prompts beyond its capacity, but none that memory cannot hold") {
  const char* folder = std::getenv("CRT_TEST_WINDOW_BUNDLE");
  if (folder == nullptr) {
    MESSAGE("left out: CRT_TEST_WINDOW_BUNDLE names no bundle (validate/cpp makes one)");
    return;
  }
  const Opened opened(folder);
  auto options = initialised(crt_session_options_init);
  options.capacity = 8;
  options.on_full = CRT_ON_FULL_SLIDE;
  crt_session* sliding = nullptr;
  REQUIRE(crt_session_open(opened.bundle, nullptr, &options, &sliding) == CRT_OK);
  crt_session* fork = nullptr;
  REQUIRE(crt_session_fork(sliding, &fork) == CRT_OK);
  const std::vector<std::int64_t> ids(20, 40);
  const std::int64_t length = 20;
  const std::int64_t huge = std::numeric_limits<std::int64_t>::max();
  for (crt_session* session : {sliding, fork}) {
    CHECK(crt_session_prefill(session, ids.data(), &length, 1, nullptr, nullptr) == CRT_OK);
    CHECK(crt_session_prefill(session, ids.data(), &huge, 1, nullptr, nullptr) == CRT_ERROR_INPUT);
    CHECK_MESSAGE(error_names("row 0: 9223372036854775807 tokens are more than memory can hold"),
                  std::string(crt_last_error()));
    crt_session_close(session);
  }
}

TEST_CASE("C API: a generation that fails leaves its outputs alone") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  const auto options = generation_options(5, nullptr);
  crt_generation* generation = nullptr;
  const std::int64_t length = 3;
  REQUIRE(crt_session_generate(opened.session, kPrompt.data(), &length, 1, &options, &generation) == CRT_OK);
  std::int64_t token = 0;
  std::int32_t more = 0;
  REQUIRE(crt_generation_next(generation, &token, 1, &more) == CRT_OK);
  REQUIRE(crt_session_reset(opened.session) == CRT_OK);
  token = -7;
  more = -7;
  CHECK(crt_generation_next(generation, &token, 1, &more) == CRT_ERROR_INPUT);
  CHECK(token == -7);
  CHECK(more == -7);
  crt_generation_free(generation);
}

TEST_CASE("C API: no session gets more threads than a profile may ask for") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Opened opened(folder);
  auto options = initialised(crt_session_options_init);
  options.threads = 1025;
  crt_session* session = nullptr;
  CHECK(crt_session_open(opened.bundle, nullptr, &options, &session) == CRT_ERROR_INPUT);
  CHECK_MESSAGE(error_names("threads must be at least 0 and at most 1024, found 1025"), std::string(crt_last_error()));
}
