// Every allocation of every call of the C API fails once: the call says so, nothing ends the program, and the handle is
// as it was, or refuses until it is reset. Under AddressSanitizer nothing leaks either.
#include <doctest/doctest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <vector>

#include "allocation_count.hpp"
#include "bundle_folder.hpp"
#include "c_api_calls.hpp"
#include "crt_runtime/crt.h"
#include "given_folder.hpp"

namespace {

namespace fs = std::filesystem;
using crt_test::initialised;
using crt_test::warm;

using Call = std::function<crt_status()>;
using Check = std::function<void(crt_status)>;

std::size_t failures = 0;  // of all tests in this file

const std::vector<std::int64_t> kPrompt = {10, 20, 30};
constexpr std::int64_t kStep = 40;

/// Run the call again and again, each time with a later allocation that fails, until none is left; then it succeeds.
///
/// prepare: before each try. after: what must hold after a try in which an allocation failed, its status given; a call
/// may do without what it could not get. stride: every so many allocations only. Returns how many failed.
std::size_t fail_everywhere(const std::string& name, const Call& call, const std::function<void()>& prepare,
                            const Check& after, std::size_t stride = 1) {
  INFO(name);
  for (std::size_t index = 0;; index += stride) {
    prepare();
    crt_test::fail_allocation_after(index);
    const crt_status status = call();
    const bool failed = crt_test::take_failed_allocation();
    if (!failed) {
      CHECK(status == CRT_OK);
      after(status);
      return index;
    }
    ++failures;
    // As input where a smaller batch or capacity is the way out.
    if (status == CRT_ERROR_INPUT) CHECK(crt_test::error_names("memory"));
    if (status != CRT_OK) CHECK(std::strlen(crt_last_error()) > 0);
    after(status);
  }
}

const auto kNothing = [] {};

crt_bundle* opened_bundle(const char* folder) {
  auto options = initialised(crt_bundle_options_init);
  options.allow_unvalidated = 1;
  crt_bundle* bundle = nullptr;
  REQUIRE(crt_bundle_open(folder, &options, &bundle) == CRT_OK);
  return bundle;
}

crt_session_options one_thread() {
  auto options = initialised(crt_session_options_init);
  options.threads = 1;  // so that everything runs in the thread whose allocations fail
  options.capacity = 16;
  return options;
}

/// A session, and what it gives when nothing fails.
class Reference {
 public:
  explicit Reference(const char* folder) : bundle(opened_bundle(folder)) {
    const auto options = one_thread();
    REQUIRE(crt_session_open(bundle, nullptr, &options, &session) == CRT_OK);
    REQUIRE(crt_session_vocab_size(session, &vocab) == CRT_OK);
    start();
    after_prompt = logits();
    REQUIRE(crt_session_step(session, &kStep, 1, nullptr) == CRT_OK);
    after_step = logits();
  }
  ~Reference() {
    crt_session_close(session);
    crt_bundle_close(bundle);
  }
  Reference(const Reference&) = delete;
  Reference& operator=(const Reference&) = delete;

  /// The prompt, and nothing else.
  void start() const {
    REQUIRE(crt_session_reset(session) == CRT_OK);
    REQUIRE(prefill() == CRT_OK);
  }
  crt_status prefill() const {
    const auto length = static_cast<std::int64_t>(kPrompt.size());
    return crt_session_prefill(session, kPrompt.data(), &length, 1, nullptr, nullptr);
  }
  std::vector<float> logits() const {
    const float* values = nullptr;
    REQUIRE(crt_session_logits(session, &values) == CRT_OK);
    return {values, values + vocab};
  }
  std::int64_t position() const {
    const std::int64_t* positions = nullptr;
    REQUIRE(crt_session_position(session, &positions) == CRT_OK);
    return positions[0];
  }
  /// The session stands behind the prompt, or refuses everything until it is reset.
  void check_untouched_or_poisoned() const {
    const float* values = nullptr;
    if (crt_session_logits(session, &values) == CRT_OK) {
      CHECK(position() == static_cast<std::int64_t>(kPrompt.size()));
      CHECK(logits() == after_prompt);
    } else {
      CHECK(crt_test::error_names("call reset() or restore() before going on"));
      start();
    }
    CHECK(crt_session_step(session, &kStep, 1, nullptr) == CRT_OK);
    CHECK(logits() == after_step);
  }

  crt_bundle* bundle;
  crt_session* session = nullptr;
  std::int64_t vocab = 0;
  std::vector<float> after_prompt;
  std::vector<float> after_step;
};

}  // namespace

TEST_CASE("allocation failures: opening a bundle and reading from it") {
  crt_test::BundleFolder small;  // a manifest of a few kilobytes, so that every one of its allocations can fail
  const std::string path = small.text();
  const char* folder = path.c_str();
  auto options = initialised(crt_bundle_options_init);
  options.allow_unvalidated = 1;
  crt_bundle* bundle = nullptr;
  const std::size_t count = fail_everywhere(
      "crt_bundle_open", [&] { return crt_bundle_open(folder, &options, &bundle); }, [&] { bundle = nullptr; },
      [&](crt_status status) {
        CHECK((status == CRT_OK) == (bundle != nullptr));
        crt_bundle_close(bundle);
      });
  CHECK(count > 100);
  bundle = opened_bundle(folder);
  const char* text = nullptr;
  std::size_t size = 0;
  const auto ignore = [](crt_status) {};
  fail_everywhere("crt_bundle_identity", [&] { return crt_bundle_identity(bundle, &text); }, kNothing, ignore);
  fail_everywhere("crt_bundle_target", [&] { return crt_bundle_target(bundle, 0, &text); }, kNothing, ignore);
  fail_everywhere("crt_bundle_default_target", [&] { return crt_bundle_default_target(bundle, &text); }, kNothing,
                  ignore);
  fail_everywhere("crt_bundle_target_count", [&] { return crt_bundle_target_count(bundle, &size); }, kNothing, ignore);
  auto config = initialised(crt_model_config_init);
  fail_everywhere("crt_bundle_config", [&] { return crt_bundle_config(bundle, &config); }, kNothing, ignore);
  crt_bundle_close(bundle);
}

TEST_CASE("allocation failures: text") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt_bundle* bundle = opened_bundle(folder);
  auto config = initialised(crt_model_config_init);
  REQUIRE(crt_bundle_config(bundle, &config) == CRT_OK);
  if (std::string(config.tokenizer) == "byte") {
    const std::string given(300, 'a');
    std::vector<std::int64_t> ids(given.size());
    std::string text(given.size() + 1, '?');
    std::size_t count = 0;
    const auto encode = [&] { return crt_encode(bundle, given.data(), given.size(), 0, ids.data(), 300, &count); };
    const auto decode = [&] { return crt_decode(bundle, ids.data(), 300, text.data(), text.size(), &count); };
    const auto ignore = [](crt_status) {};
    CHECK(fail_everywhere("crt_encode", encode, kNothing, ignore) > 0);
    CHECK(fail_everywhere("crt_decode", decode, kNothing, ignore) > 0);
    CHECK(text == given + '\0');
    crt_text_stream* stream = nullptr;
    fail_everywhere("crt_text_stream_new", [&] { return crt_text_stream_new(bundle, &stream); },
                    [&] { stream = nullptr; }, [&](crt_status status) {
                      CHECK((status == CRT_OK) == (stream != nullptr));
                      crt_text_stream_free(stream);
                    });
    REQUIRE(crt_text_stream_new(bundle, &stream) == CRT_OK);
    const char* piece = nullptr;
    fail_everywhere("crt_text_stream_push", [&] { return crt_text_stream_push(stream, 0xC3, &piece, &count); },
                    kNothing, ignore);
    fail_everywhere("crt_text_stream_finish", [&] { return crt_text_stream_finish(stream, &piece, &count); }, kNothing,
                    ignore);
    crt_text_stream_free(stream);
  }
  crt_bundle_close(bundle);
}

TEST_CASE("allocation failures: a session opens or does not") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt_bundle* bundle = opened_bundle(folder);
  const auto options = one_thread();
  crt_session* session = nullptr;
  const auto open = [&] { return crt_session_open(bundle, nullptr, &options, &session); };
  const auto forget = [&] { session = nullptr; };
  const auto close = [&](crt_status status) {
    CHECK((status == CRT_OK) == (session != nullptr));
    crt_session_close(session);
  };
  // The first time the engine is loaded too; from then on the bundle keeps it while a session is open.
  const std::size_t loading = fail_everywhere("crt_session_open", open, forget, close, 13);
  REQUIRE(open() == CRT_OK);
  crt_session* kept = session;
  const std::size_t sharing = fail_everywhere("crt_session_open of an engine that is loaded", open, forget, close);
  CHECK(sharing > 10);
  CHECK(loading > sharing);
  crt_session_close(kept);
  crt_bundle_close(bundle);
}

TEST_CASE("allocation failures: a session is untouched or refuses until it is reset") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Reference reference(folder);
  crt_session* session = reference.session;
  const auto start = [&] { reference.start(); };
  const auto untouched = [&](crt_status status) {
    if (status != CRT_OK) reference.check_untouched_or_poisoned();
  };
  const auto step = [&] { return crt_session_step(session, &kStep, 1, nullptr); };
  fail_everywhere("crt_session_step", step, start, untouched);
  fail_everywhere("crt_session_advance", [&] { return crt_session_advance(session, &kStep, 1); }, start, untouched);
  const float* logits = nullptr;
  fail_everywhere("crt_session_logits", [&] { return crt_session_logits(session, &logits); }, start, untouched);
  const std::int64_t* next = nullptr;
  fail_everywhere("crt_session_next_tokens", [&] { return crt_session_next_tokens(session, &next); }, start, untouched);
  fail_everywhere("crt_session_reset", [&] { return crt_session_reset(session); }, start, untouched);
  const auto prefill = [&] { return reference.prefill(); };
  const std::size_t count = fail_everywhere(
      "crt_session_prefill", prefill, [&] { REQUIRE(crt_session_reset(session) == CRT_OK); },
      [&](crt_status status) {
        if (status == CRT_OK) {
          CHECK(reference.logits() == reference.after_prompt);
          return;
        }
        const std::int64_t* positions = nullptr;
        const bool usable = crt_session_next_tokens(session, &next) == CRT_OK;
        REQUIRE(crt_session_position(session, &positions) == CRT_OK);
        if (usable) CHECK(positions[0] == 0);
        start();
        CHECK(reference.logits() == reference.after_prompt);
      });
  CHECK(count > 3);
}

TEST_CASE("allocation failures: snapshots and forks") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Reference reference(folder);
  crt_session* session = reference.session;
  const auto start = [&] { reference.start(); };
  crt_snapshot* snapshot = nullptr;
  const std::size_t count = fail_everywhere(
      "crt_session_snapshot", [&] { return crt_session_snapshot(session, &snapshot); },
      [&] {
        start();
        snapshot = nullptr;
      },
      [&](crt_status status) {
        CHECK((status == CRT_OK) == (snapshot != nullptr));
        crt_snapshot_free(snapshot);
        reference.check_untouched_or_poisoned();
      });
  CHECK(count > 10);
  crt_session* fork = nullptr;
  fail_everywhere("crt_session_fork", [&] { return crt_session_fork(session, &fork); },
                  [&] {
                    start();
                    fork = nullptr;
                  },
                  [&](crt_status status) {
                    CHECK((status == CRT_OK) == (fork != nullptr));
                    crt_session_close(fork);
                    reference.check_untouched_or_poisoned();
                  });
  start();
  REQUIRE(crt_session_snapshot(session, &snapshot) == CRT_OK);
  fail_everywhere("crt_session_restore", [&] { return crt_session_restore(session, snapshot); }, start,
                  [&](crt_status) { reference.check_untouched_or_poisoned(); });

  std::string pattern = (fs::temp_directory_path() / "crt_failures_XXXXXX").string();
  REQUIRE(mkdtemp(pattern.data()) != nullptr);
  const std::string file = pattern + "/s";
  const auto content = [&] {
    std::ifstream stream(file, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(stream), {});
  };
  const auto files = [&] { return std::distance(fs::directory_iterator(pattern), {}); };
  REQUIRE(crt_snapshot_save(snapshot, file.c_str()) == CRT_OK);
  const std::string whole = content();
  fail_everywhere("crt_snapshot_save", [&] { return crt_snapshot_save(snapshot, file.c_str()); }, kNothing,
                  [&](crt_status) {
                    CHECK(content() == whole);
                    CHECK(files() == 1);
                  });
  crt_snapshot* loaded = nullptr;
  fail_everywhere("crt_snapshot_load", [&] { return crt_snapshot_load(file.c_str(), &loaded); },
                  [&] { loaded = nullptr; }, [&](crt_status status) {
                    CHECK((status == CRT_OK) == (loaded != nullptr));
                    crt_snapshot_free(loaded);
                  });
  crt_snapshot_free(snapshot);
  fs::remove_all(pattern);
}

TEST_CASE("allocation failures: generations") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const Reference reference(folder);
  crt_session* session = reference.session;
  const auto start = [&] { reference.start(); };
  const auto sampling = warm();
  auto options = initialised(crt_generation_options_init);
  options.max_new_tokens = 3;
  options.ignore_eos = 1;
  options.sampling = &sampling;
  const char* const stops[] = {"a stop string that is too long for its object"};
  auto config = initialised(crt_model_config_init);
  REQUIRE(crt_bundle_config(reference.bundle, &config) == CRT_OK);
  if (std::string(config.tokenizer) == "byte") {
    options.stop_strings = stops;
    options.stop_string_count = 1;
  }
  crt_generation* generation = nullptr;
  const auto generate = [&] { return crt_session_generate(session, nullptr, nullptr, 0, &options, &generation); };
  CHECK(fail_everywhere("crt_session_generate", generate,
                        [&] {
                          start();
                          generation = nullptr;
                        },
                        [&](crt_status status) {
                          CHECK((status == CRT_OK) == (generation != nullptr));
                          crt_generation_free(generation);
                          reference.check_untouched_or_poisoned();
                        }) > 3);
  std::int64_t token = 0;
  std::int32_t more = 0;
  const char* text = nullptr;
  std::size_t size = 0;
  const std::int64_t* tokens = nullptr;
  const auto all_of_it = [&] {
    for (int turn = 0; turn < 5; ++turn) {
      const crt_status status = crt_generation_next(generation, &token, 1, &more);
      if (status != CRT_OK) return status;
    }
    const crt_status status = crt_generation_text(generation, 0, &text, &size);
    return status != CRT_OK ? status : crt_generation_tokens(generation, 0, &tokens, &size);
  };
  CHECK(fail_everywhere("crt_generation_next", all_of_it,
                        [&] {
                          start();
                          REQUIRE(generate() == CRT_OK);
                        },
                        [&](crt_status) {
                          crt_generation_free(generation);
                          start();  // whatever the generation came to, the session lives
                          CHECK(reference.logits() == reference.after_prompt);
                        }) > 0);
}

TEST_CASE("allocation failures: one draw") {
  const float logits[] = {0.0F, 1.0F, 2.0F};
  const auto options = warm();
  std::int64_t token = -7;
  CHECK(fail_everywhere("crt_sample_token",
                        [&] { return crt_sample_token(logits, nullptr, 3, &options, 0, 0, &token); },
                        [&] { token = -7; }, [&](crt_status status) { CHECK((status == CRT_OK) == (token != -7)); }) >
        0);
}

TEST_CASE("allocation failures: where even the words of an error find no memory") {
  crt_test::exhaust_memory(true);
  crt_bundle* bundle = nullptr;
  const crt_status status = crt_bundle_open("/no/such/bundle", nullptr, &bundle);
  crt_test::exhaust_memory(false);
  CHECK(status == CRT_ERROR_INTERNAL);
  CHECK(crt_test::error_names("out of memory"));
  MESSAGE(failures, " allocations failed, one at a time");
}
