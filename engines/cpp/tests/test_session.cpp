// Sessions on a real bundle: rows in company, continuing, refusing, failing.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "crt_runtime/session.hpp"
#include "given_bundle.hpp"

namespace {

using crt::ErrorKind;
using crt::kNoToken;
using crt::Session;
using crt::SessionOptions;
using crt_test::contains;
using crt_test::distance;
using crt_test::error_text;
using crt_test::row_of;
using crt_test::some_tokens;
using Rows = std::vector<std::vector<std::int64_t>>;

constexpr double kClose = 2e-5;

Session open(crt::Bundle& bundle, std::int64_t batch = 1, std::int64_t capacity = 32,
             const std::string& target = "ort-cpu-fp32") {
  SessionOptions options;
  options.batch = batch;
  options.capacity = capacity;
  return bundle.session(target, options);
}

}  // namespace

TEST_CASE("session: rows of unequal length agree with each row alone, over prefill, step and prefill again") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const Rows rows{some_tokens(9), some_tokens(1, 1), some_tokens(5, 2)};
  const Rows more{{60, 61}, {62, 62, 62, 62}, {63}};
  Session batch = open(bundle, 3);
  const std::int64_t vocab = batch.vocab_size();
  std::vector<std::vector<float>> together;
  const auto keep = [&](const float* logits) { together.emplace_back(logits, logits + 3 * vocab); };
  keep(batch.prefill(rows));
  keep(batch.step({40, 41, 42}));
  keep(batch.prefill(more));
  for (std::int64_t row = 0; row < 3; ++row) {
    Session alone = open(bundle);
    const auto index = static_cast<std::size_t>(row);
    CHECK(distance(row_of(together[0].data(), row, vocab), row_of(alone.prefill({rows[index]}), 0, vocab)) <= kClose);
    CHECK(distance(row_of(together[1].data(), row, vocab), row_of(alone.step({40 + row}), 0, vocab)) <= kClose);
    CHECK(distance(row_of(together[2].data(), row, vocab), row_of(alone.prefill({more[index]}), 0, vocab)) <= kClose);
    CHECK(batch.position()[row] == alone.position()[0]);
  }
}

TEST_CASE("session: a row that takes no part keeps its logits, position and future; one without tokens has NaN") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle, 3);
  Session twin = open(bundle, 3);
  const std::int64_t vocab = session.vocab_size();
  const Rows rows{some_tokens(3), some_tokens(4, 1), {}};
  const std::vector<float> before = row_of(session.prefill(rows), 1, vocab);
  CHECK(std::isnan(session.logits()[2 * vocab]));
  CHECK(session.next_tokens()[2] == kNoToken);
  twin.prefill(rows);
  session.prefill({{80, 81}, {}, {82}});
  CHECK(row_of(session.logits(), 1, vocab) == before);
  CHECK(session.position()[1] == 4);
  const std::vector<float> found = row_of(session.step({kNoToken, 90, kNoToken}), 1, vocab);
  CHECK(distance(found, row_of(twin.step({91, 90, kNoToken}), 1, vocab)) <= kClose);
}

TEST_CASE("session: as many passes as tokens give what steps give, in chunks of any size") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const std::vector<std::int64_t> ids = some_tokens(7);
  Session steps = open(bundle);
  const std::int64_t vocab = steps.vocab_size();
  for (const std::int64_t id : ids) {
    steps.step({id});
  }
  for (const std::int64_t chunk : {1, 3, 7}) {
    Session passes = open(bundle);
    crt::PrefillOptions options;
    options.passes = chunk;
    options.chunk = chunk;
    CHECK(distance(row_of(passes.prefill({ids}, options), 0, vocab), row_of(steps.logits(), 0, vocab)) <= kClose);
    options.passes = 1;
    options.chunk = 7;
    Session one = open(bundle);
    CHECK(distance(row_of(one.prefill({ids}, options), 0, vocab), row_of(steps.logits(), 0, vocab)) > 1e-4);
  }
}

TEST_CASE("session: advance() counts and chooses as step() does") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session stepped = open(bundle);
  Session advanced = open(bundle);
  stepped.prefill({some_tokens(5)});
  advanced.prefill({some_tokens(5)});
  const std::int64_t vocab = stepped.vocab_size();
  for (int index = 0; index < 8; ++index) {
    const std::int64_t token = stepped.next_tokens()[0];
    const float* logits = stepped.step(&token, 1);
    CHECK(std::max_element(logits, logits + vocab) - logits == stepped.next_tokens()[0]);
    advanced.advance(&token, 1);
    CHECK(advanced.next_tokens()[0] == stepped.next_tokens()[0]);
  }
  CHECK(row_of(advanced.logits(), 0, vocab) == row_of(stepped.logits(), 0, vocab));
  CHECK(advanced.position()[0] == 13);
}

TEST_CASE("session: what is refused changes nothing, and says why") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle, 2, 16);
  Session twin = open(bundle, 2, 16);
  for (Session* each : {&session, &twin}) {
    each->prefill({some_tokens(3), some_tokens(3, 1)});
  }
  crt::PrefillOptions negative;
  negative.passes = -3;
  crt::PrefillOptions long_chunk;
  long_chunk.chunk = 100000;
  const std::int64_t vocab = session.vocab_size();
  const std::vector<std::pair<std::function<void()>, std::string>> refused{
      {[&] { session.prefill({{}, {}}); }, "empty prompt"},
      {[&] { session.prefill({{40}}); }, "batch is 2, found 1 rows"},
      {[&] { session.prefill({{40}, {41, vocab}}); }, "row 1: token id 256 at index 1 is outside the vocabulary"},
      {[&] { session.prefill({{-1}, {999}}); }, "2 problems\n  - row 0: token id -1 at index 0"},
      {[&] { session.prefill({std::vector<std::int64_t>(14, 40), {41}}); },
       "row 0: 3 tokens in the cache and 14 more exceed the capacity of 16"},
      {[&] { session.prefill({{40}, {41}}, negative); }, "passes must be at least 1, found -3"},
      {[&] { session.prefill({{40}, {41}}, long_chunk); }, "chunk must be at least 1 and at most"},
      {[&] { session.step({40}); }, "expected one token id per row: batch is 2, found 1"},
      {[&] { session.step({40, vocab}); }, "row 1: token id 256 is outside the vocabulary (0 to 255)"},
      {[&] { session.step({-2, 40}); }, "row 0: token id -2"},
      {[&] { session.step({kNoToken, kNoToken}); }, "at least one row"},
  };
  for (const auto& [call, part] : refused) {
    CHECK_MESSAGE(contains(error_text(ErrorKind::input, call), part), part);
  }
  CHECK(session.position()[0] == 3);
  const std::vector<float> found = row_of(session.step({50, 51}), 1, vocab);
  CHECK(found == row_of(twin.step({50, 51}), 1, vocab));
}

TEST_CASE("session: the cache can be filled to the last token and no further") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle, 1, 6);
  session.prefill({some_tokens(5)});
  session.step({70});
  CHECK(contains(error_text(ErrorKind::input, [&] { session.step({71}); }), "6 tokens in the cache and 1 more"));
  CHECK(contains(error_text(ErrorKind::input, [&] { session.prefill({{71}}); }), "6 tokens in the cache and 1 more"));
  CHECK(session.position()[0] == 6);
}

TEST_CASE("session: a value that is not finite poisons until reset() or restore()") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  constexpr std::int64_t kOverflowing = 7;  // the test's bundle is made so that this token's h is infinite
  Session session = open(bundle, 2);
  const std::int64_t vocab = session.vocab_size();
  const Rows rows{some_tokens(3), some_tokens(5, 1)};
  const std::vector<float> fresh = row_of(session.prefill(rows), 1, vocab);
  const crt::Snapshot good = session.snapshot();
  for (const bool with_step : {true, false}) {
    const std::string text = error_text(ErrorKind::contract, [&] {
      with_step ? session.step({60, kOverflowing}) : session.prefill({{60}, {61, kOverflowing}});
    });
    CHECK(contains(text, with_step ? "is not finite: row 1 after position 5" : "is not finite: row 1 after position 6"));
    CHECK(session.position()[1] == 5);
    for (const auto& call : std::vector<std::function<void()>>{
             [&] { session.step({60, 61}); }, [&] { session.prefill(rows); }, [&] { session.logits(); },
             [&] { session.next_tokens(); }, [&] { session.snapshot(); }, [&] { session.fork(); },
             [&] { session.generate({{40}, {41}}); }}) {
      CHECK(contains(error_text(ErrorKind::input, call), "earlier call of this session failed"));
    }
    if (with_step) {
      session.restore(good);
      CHECK(row_of(session.logits(), 1, vocab) == fresh);
    } else {
      session.reset();
      CHECK(row_of(session.prefill(rows), 1, vocab) == fresh);
    }
  }
}

TEST_CASE("session: a fork goes on as the original would have, and neither touches the other") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session session = open(bundle, 2);
  session.prefill({some_tokens(4), some_tokens(2, 1)});
  session.step({50, 51});
  Session other = session.fork();
  const std::int64_t vocab = session.vocab_size();
  CHECK(row_of(other.logits(), 1, vocab) == row_of(session.logits(), 1, vocab));
  session.step({70, 71});
  const std::vector<float> found = row_of(other.step({60, 61}), 0, vocab);
  Session twin = open(bundle, 2);
  twin.prefill({some_tokens(4), some_tokens(2, 1)});
  twin.step({50, 51});
  CHECK(row_of(twin.step({60, 61}), 0, vocab) == found);
  CHECK(other.position()[0] == 6);
}

TEST_CASE("session: it outlives its bundle, and sessions of a target share one engine") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  Session first = open(bundle);
  Session second = open(bundle);
  const std::int64_t vocab = first.vocab_size();
  { const crt::Bundle gone = std::move(bundle); }
  const std::vector<float> logits = row_of(first.prefill({some_tokens(4)}), 0, vocab);
  CHECK(row_of(second.prefill({some_tokens(4)}), 0, vocab) == logits);
  CHECK(row_of(first.fork().logits(), 0, vocab) == logits);
}

TEST_CASE("bundle: what a session cannot be opened with is refused") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const auto refused = [&](const SessionOptions& options, const std::string& target = "ort-cpu-fp32") {
    return error_text(ErrorKind::input, [&] { bundle.session(target, options); });
  };
  SessionOptions options;
  CHECK(contains(refused(options, "nonsense"), "unknown target 'nonsense'"));
  options.batch = 0;
  CHECK(refused(options) == "batch must be at least 1, found 0");
  options = SessionOptions();
  options.threads = -1;
  CHECK(refused(options) == "threads must be at least 0 and at most 1024, found -1");
  options = SessionOptions();
  options.capacity = bundle.config().max_position_embeddings + 1;
  CHECK(contains(refused(options), "what ort-cpu-fp32 was built for"));
  options = SessionOptions();
  options.on_full = crt::OnFull::slide;
  CHECK(contains(refused(options), "needs a model with an attention window"));
  CHECK(bundle.default_target() == "ort-cpu-fp32");
  // The test's bundle promises float16 caches for this target, and its graphs have float32.
  const std::string broken = error_text(ErrorKind::contract, [&] { bundle.session("broken"); });
  CHECK(contains(broken, "the graphs of broken break the contract: "));
  CHECK(contains(broken, "  - prefill_pass: input past_key_values.0.key: float32 [?, 4, ?, 8] was expected to be float16"));
  CHECK(contains(broken, "  - prefill_pass: output present_key_values.0.value"));
}

#if !defined(CRT_RUNTIME_TENSORRT_RTX)
TEST_CASE("bundle: a target whose back end was left out of this build is refused") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const std::string text = error_text(ErrorKind::unsupported, [&] { bundle.session("rtx-sm80-fp16"); });
  CHECK(contains(text, "rtx-sm80-fp16 runs on tensorrt-rtx (cuda); this library was built for ONNX Runtime on a CPU"));
}
#endif
