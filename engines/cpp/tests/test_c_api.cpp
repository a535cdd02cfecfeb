// The C API without a model: options, NULL, statuses and messages, one draw.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "c_api_calls.hpp"
#include "crt_runtime/crt.h"
#include "crt_runtime/crt_runtime.hpp"

using crt_test::error_names;
using crt_test::initialised;
using crt_test::warm;

TEST_CASE("C API: options start with the defaults of the C++ API") {
  const auto sampling = initialised(crt_sampling_options_init);
  const crt::SamplingOptions expected;
  CHECK(sampling.struct_size == sizeof sampling);
  CHECK(sampling.temperature == expected.temperature);
  CHECK(sampling.top_k == expected.top_k);
  CHECK(sampling.top_p == expected.top_p);
  CHECK(sampling.min_p == expected.min_p);
  CHECK(sampling.repetition_penalty == expected.repetition_penalty);
  CHECK(sampling.seed == expected.seed);
  const auto generation = initialised(crt_generation_options_init);
  CHECK(generation.max_new_tokens == crt::GenerationOptions().max_new_tokens);
  CHECK((generation.callback == nullptr));
  const auto session = initialised(crt_session_options_init);
  CHECK(session.batch == 1);
  CHECK(session.threads == -1);
  CHECK(initialised(crt_prefill_options_init).passes == 0);
  CHECK(initialised(crt_bundle_options_init).allow_unvalidated == 0);
}

TEST_CASE("C API: init writes no more than the caller's struct, and structs of another size are refused") {
  struct {
    crt_sampling_options options;
    unsigned char behind[8];
  } memory;
  std::memset(&memory, 0xAB, sizeof memory);
  crt_sampling_options_init(&memory.options, sizeof memory.options - 8);
  CHECK(memory.options.struct_size == sizeof memory.options - 8);
  CHECK(reinterpret_cast<unsigned char*>(&memory.options)[sizeof memory.options - 8] == 0xAB);
  crt_sampling_options_init(nullptr, sizeof memory.options);

  const float logits[] = {0.0F, 1.0F};
  std::int64_t token = -7;
  for (const std::size_t size : {std::size_t{0}, sizeof memory.options - 8, sizeof memory.options + 8}) {
    memory.options.struct_size = size;
    CHECK(crt_sample_token(logits, nullptr, 2, &memory.options, 0, 0, &token) == CRT_ERROR_INPUT);
    CHECK(error_names("struct_size is "));
    CHECK(token == -7);
  }
}

TEST_CASE("C API: NULL is refused everywhere, all NULLs named, and harmless to close") {
  CHECK(crt_bundle_open(nullptr, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(error_names("path must not be NULL"));
  CHECK(error_names("bundle must not be NULL"));
  crt_bundle* bundle = nullptr;
  CHECK(crt_bundle_open(nullptr, nullptr, &bundle) == CRT_ERROR_INPUT);
  CHECK(bundle == nullptr);
  CHECK(crt_bundle_identity(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_bundle_target_count(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_bundle_target(nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_bundle_default_target(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_bundle_config(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_encode(nullptr, nullptr, 0, 0, nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_decode(nullptr, nullptr, 0, nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_text_stream_new(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_text_stream_push(nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_text_stream_finish(nullptr, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_open(nullptr, nullptr, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_target(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_batch(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_capacity(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_vocab_size(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_position(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_prefill(nullptr, nullptr, nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_step(nullptr, nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_advance(nullptr, nullptr, 0) == CRT_ERROR_INPUT);
  CHECK(crt_session_logits(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_next_tokens(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_reset(nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_snapshot(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_restore(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_fork(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_snapshot_save(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_snapshot_load(nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_session_generate(nullptr, nullptr, nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_next(nullptr, nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_tokens(nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_text(nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_piece(nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_rest(nullptr, 0, nullptr, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_generation_stop_reason(nullptr, 0, nullptr) == CRT_ERROR_INPUT);
  CHECK(crt_sample_token(nullptr, nullptr, 0, nullptr, 0, 0, nullptr) == CRT_ERROR_INPUT);
  crt_bundle_close(nullptr);
  crt_session_close(nullptr);
  crt_snapshot_free(nullptr);
  crt_generation_free(nullptr);
  crt_text_stream_free(nullptr);
}

TEST_CASE("C API: errors keep their kind; the message belongs to its thread") {
  crt_bundle* bundle = nullptr;
  CHECK(crt_bundle_open("/no/such/bundle", nullptr, &bundle) == CRT_ERROR_BUNDLE);
  CHECK(error_names("/no/such/bundle"));
  std::string other = "unset";
  std::thread([&other] { other = crt_last_error(); }).join();
  CHECK(other == "");
  const float logits[] = {NAN};
  std::int64_t token = 0;
  CHECK(crt_sample_token(logits, nullptr, 1, nullptr, 0, 0, &token) == CRT_ERROR_CONTRACT);
  CHECK(crt_sample_token(logits, nullptr, 0, nullptr, 0, 0, &token) == CRT_ERROR_INPUT);
  CHECK(crt_sample_token(logits, nullptr, SIZE_MAX, nullptr, 0, 0, &token) == CRT_ERROR_INPUT);
  CHECK(error_names("vocab 18446744073709551615 needs more memory than there is"));
  CHECK(std::string(crt_status_name(CRT_ERROR_CONTRACT)) == "contract");
  CHECK(std::string(crt_version()).find('.') != std::string::npos);
}

TEST_CASE("C API: sample_token draws what Sampler draws, and checks its options") {
  const std::vector<float> logits = {0.5F, 2.0F, -1.0F, 1.5F};
  const std::vector<std::uint8_t> seen = {0, 1, 0, 0};
  auto options = warm();
  crt::SamplingOptions expected;
  expected.temperature = options.temperature;
  expected.repetition_penalty = options.repetition_penalty;
  expected.seed = options.seed;
  crt::Sampler sampler(4);
  for (std::uint64_t step = 0; step < 50; ++step) {
    std::int64_t token = 0;
    CHECK(crt_sample_token(logits.data(), seen.data(), 4, &options, 2, step, &token) == CRT_OK);
    CHECK(token == sampler.sample(logits.data(), seen.data(), expected, 2, step));
  }
  std::int64_t greedy = 0;
  CHECK(crt_sample_token(logits.data(), nullptr, 4, nullptr, 0, 0, &greedy) == CRT_OK);
  CHECK(greedy == 1);
  options.top_p = 2.0;
  CHECK(crt_sample_token(logits.data(), nullptr, 4, &options, 0, 0, &greedy) == CRT_ERROR_INPUT);
  CHECK(error_names("top_p"));
}
