// The loop around a session, on a real bundle: every generation is compared with the same loop by hand.
#include <doctest/doctest.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "allocation_count.hpp"
#include "crt_runtime/bundle.hpp"
#include "crt_runtime/error.hpp"
#include "given_folder.hpp"

namespace {

using crt::kNoToken;
using crt::StopReason;
using Rows = std::vector<std::vector<std::int64_t>>;

constexpr std::int64_t kNew = 12;

crt::Session opened(const char* folder, std::int64_t batch) {
  crt::Bundle bundle = crt::Bundle::load(folder, true);
  crt::SessionOptions options;
  options.batch = batch;
  options.threads = 1;
  options.capacity = 64;
  return bundle.session(bundle.default_target(), options);
}

/// Options under which nothing but max_new_tokens ends a row.
crt::GenerationOptions going_on(std::int64_t tokens = kNew) {
  crt::GenerationOptions options;
  options.max_new_tokens = tokens;
  options.ignore_eos = true;
  return options;
}

crt::GenerationOptions sampled(std::int64_t tokens = kNew) {
  crt::GenerationOptions options = going_on(tokens);
  options.sampling.temperature = 1.3;
  options.sampling.top_k = 50;
  options.sampling.repetition_penalty = 1.2;
  options.sampling.seed = 11;
  return options;
}

/// All tokens of a generation, per row.
Rows read(crt::Generation& generation, std::size_t batch) {
  std::vector<std::int64_t> given(batch);
  while (generation.next(given.data())) {
  }
  Rows tokens;
  for (std::size_t row = 0; row < batch; ++row) tokens.push_back(generation.tokens(row));
  return tokens;
}

std::vector<std::int64_t> generated(const char* folder, const crt::GenerationOptions& options) {
  crt::Session session = opened(folder, 1);
  crt::Generation generation = session.generate({{10, 20, 30}}, options);
  return read(generation, 1)[0];
}

std::string refusal(crt::Session& session, Rows prompts, const crt::GenerationOptions& options) {
  try {
    session.generate(std::move(prompts), options);
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::input);
    return error.what();
  }
  return "";
}

const Rows kPrompts = {{10, 20, 30}, {200}, {6, 8, 9, 10, 11}};

}  // namespace

TEST_CASE("generation: greedy tokens are those of a loop by hand, rows of unequal length") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session by_hand = opened(folder, 3);
  by_hand.prefill(kPrompts);
  Rows expected(3);
  for (std::int64_t step = 0; step < kNew; ++step) {
    const std::int64_t* next = by_hand.next_tokens();
    const std::vector<std::int64_t> tokens(next, next + 3);
    for (std::size_t row = 0; row < 3; ++row) expected[row].push_back(tokens[row]);
    by_hand.step(tokens);
  }
  crt::Session session = opened(folder, 3);
  crt::Generation generation = session.generate(kPrompts, going_on());
  CHECK(read(generation, 3) == expected);
  for (std::size_t row = 0; row < 3; ++row) {
    CHECK(generation.stop_reason(row) == StopReason::max_new_tokens);
    CHECK(generation.prompt_tokens(row) == kPrompts[row].size());
    // The last token was given out and not fed.
    CHECK(session.position()[row] == static_cast<std::int64_t>(kPrompts[row].size()) + kNew - 1);
  }
}

TEST_CASE("generation: sampled tokens are those of the sampler over the session's logits") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const crt::GenerationOptions options = sampled();
  crt::Session by_hand = opened(folder, 3);
  const auto vocab = static_cast<std::size_t>(by_hand.vocab_size());
  std::vector<std::vector<std::uint8_t>> seen(3, std::vector<std::uint8_t>(vocab));
  for (std::size_t row = 0; row < 3; ++row) {
    for (const std::int64_t token : kPrompts[row]) seen[row][static_cast<std::size_t>(token)] = 1;
  }
  crt::Sampler sampler(vocab);
  const float* logits = by_hand.prefill(kPrompts);
  Rows expected(3);
  for (std::uint64_t step = 0; step < kNew; ++step) {
    std::vector<std::int64_t> tokens;
    for (std::size_t row = 0; row < 3; ++row) {
      tokens.push_back(sampler.sample(logits + row * vocab, seen[row].data(), options.sampling,
                                      static_cast<std::uint32_t>(row), step));
      seen[row][static_cast<std::size_t>(tokens[row])] = 1;
      expected[row].push_back(tokens[row]);
    }
    logits = by_hand.step(tokens);
  }
  crt::Session session = opened(folder, 3);
  crt::Generation generation = session.generate(kPrompts, options);
  CHECK(read(generation, 3) == expected);
}

TEST_CASE("generation: going on without a prompt gives what an unbroken generation gives") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  for (const auto& with : {going_on, sampled}) {
    crt::Session session = opened(folder, 1);
    crt::Generation first = session.generate({{10, 20, 30}}, with(5));
    auto tokens = read(first, 1)[0];
    crt::Session copy = session.fork();
    crt::Session restored = opened(folder, 1);
    restored.restore(session.snapshot());
    for (crt::Session* each : {&session, &copy, &restored}) {
      crt::Generation rest = each->generate({}, with(kNew - 5));
      auto all = tokens;
      const auto more = read(rest, 1)[0];
      all.insert(all.end(), more.begin(), more.end());
      CHECK(all == generated(folder, with(kNew)));
    }
  }
}

TEST_CASE("generation: a prompt behind an earlier generation comes after the token that waits") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session session = opened(folder, 1);
  crt::Generation first = session.generate({{10, 20, 30}}, going_on(3));
  auto fed = read(first, 1)[0];
  crt::Session by_hand = opened(folder, 1);
  by_hand.prefill({{10, 20, 30}});
  by_hand.step({fed[0]});
  by_hand.step({fed[1]});
  by_hand.prefill({{fed[2], 40, 50}});
  crt::Generation second = session.generate({{40, 50}}, going_on(1));
  CHECK(read(second, 1)[0][0] == by_hand.next_tokens()[0]);
  CHECK(session.position()[0] == by_hand.position()[0]);
}

TEST_CASE("generation: a stop token ends its row and is not given out; the other rows go on") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session session = opened(folder, 2);
  crt::Generation unbroken = session.generate({{10, 20, 30}, {99}}, sampled());
  const Rows all = read(unbroken, 2);
  crt::GenerationOptions options = sampled();
  options.stop_tokens = {all[0][4]};
  std::size_t end = 0;
  while (all[0][end] != all[0][4]) ++end;
  crt::Session again = opened(folder, 2);
  crt::Generation generation = again.generate({{10, 20, 30}, {99}}, options);
  const Rows tokens = read(generation, 2);
  CHECK(tokens[0] == std::vector<std::int64_t>(all[0].begin(), all[0].begin() + static_cast<std::ptrdiff_t>(end)));
  CHECK(generation.stop_reason(0) == StopReason::stop_token);
  CHECK(again.position()[0] == static_cast<std::int64_t>(3 + end));
  CHECK(std::equal(tokens[1].begin(), tokens[1].end(), all[1].begin()));
}

TEST_CASE("generation: a stop string ends the text before it, its tokens count") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr || crt::Bundle::load(folder, true).config().tokenizer != "byte") return;
  crt::Session session = opened(folder, 1);
  crt::Generation unbroken = session.generate({{10, 20, 30}}, sampled(40));
  read(unbroken, 1);
  const std::string text = unbroken.text(0);
  REQUIRE(text.size() > 12);
  crt::TextStream stream(crt::Bundle::load(folder, true).config());
  std::string before;
  for (const std::int64_t token : unbroken.tokens(0)) before += stream.push(token);
  CHECK(text == before);
  CHECK(unbroken.rest(0) == stream.finish());

  // The stop string is the character in the middle, whatever it is.
  crt::GenerationOptions options = sampled(40);
  std::size_t begin = text.size() / 2;
  while ((static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) ++begin;
  std::size_t stop_end = begin + 1;
  while (stop_end < text.size() && (static_cast<unsigned char>(text[stop_end]) & 0xC0U) == 0x80U) ++stop_end;
  options.stop_strings = {text.substr(begin, stop_end - begin)};
  crt::Session again = opened(folder, 1);
  std::string pieces;
  crt::Generation generation =
      again.generate({{10, 20, 30}}, options, [&pieces](std::int64_t, std::int64_t, const std::string& piece) {
        pieces += piece;
        return true;
      });
  const auto tokens = read(generation, 1)[0];
  CHECK(generation.stop_reason(0) == StopReason::stop_string);
  CHECK(generation.text(0) == text.substr(0, text.find(options.stop_strings[0])));
  CHECK(pieces == generation.text(0));
  CHECK(tokens.size() < unbroken.tokens(0).size());
  CHECK(std::equal(tokens.begin(), tokens.end(), unbroken.tokens(0).begin()));
}

TEST_CASE("generation: parts that go on have the text of the unbroken one, and find its stop strings") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr || crt::Bundle::load(folder, true).config().tokenizer != "byte") return;
  crt::Session session = opened(folder, 1);
  crt::Generation unbroken = session.generate({{10, 20, 30}}, sampled(40));
  read(unbroken, 1);
  const std::string text = unbroken.text(0);
  std::size_t begin = text.size() / 2;
  while ((static_cast<unsigned char>(text[begin]) & 0xC0U) == 0x80U) ++begin;
  std::size_t end = begin + 6;
  while ((static_cast<unsigned char>(text[end]) & 0xC0U) == 0x80U) ++end;
  const std::string stop = text.substr(begin, end - begin);
  for (const auto& stops : {std::vector<std::string>{}, std::vector<std::string>{stop, stop.substr(0, 1) + "never"}}) {
    crt::Session whole = opened(folder, 1);
    crt::GenerationOptions options = sampled(40);
    options.stop_strings = stops;
    crt::Generation expected = whole.generate({{10, 20, 30}}, options);
    const auto tokens = read(expected, 1)[0];
    crt::Session parts = opened(folder, 1);
    std::string found;
    std::string rest;
    std::size_t count = 0;
    StopReason reason = StopReason::running;
    while (count < 40 && reason != StopReason::stop_string) {
      options.max_new_tokens = 1;
      crt::Generation part = parts.generate(count == 0 ? Rows{{10, 20, 30}} : Rows{}, options);
      count += read(part, 1)[0].size();
      found += part.text(0);
      rest = part.rest(0);
      reason = part.stop_reason(0);
      crt::Session other = opened(folder, 1);
      other.restore(parts.snapshot());
      parts = count % 3 == 0 ? other.fork() : std::move(other);
    }
    CHECK(count == tokens.size());
    CHECK(found == expected.text(0));
    CHECK(rest == expected.rest(0));
    CHECK(reason == (stops.empty() ? StopReason::max_new_tokens : StopReason::stop_string));
  }
}

TEST_CASE("generation: the callback sees every token and its piece, and ends its row") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session session = opened(folder, 2);
  Rows seen(2);
  const auto callback = [&seen](std::int64_t row, std::int64_t token, const std::string&) {
    seen[static_cast<std::size_t>(row)].push_back(token);
    return row != 0 || seen[0].size() < 4;
  };
  crt::Generation generation = session.generate({{10, 20, 30}, {99}}, going_on(), callback);
  const Rows tokens = read(generation, 2);
  CHECK(tokens == seen);
  CHECK(tokens[0].size() == 4);
  CHECK(tokens[1].size() == static_cast<std::size_t>(kNew));
  CHECK(generation.stop_reason(0) == StopReason::callback);
  CHECK(generation.stop_reason(1) == StopReason::max_new_tokens);
}

TEST_CASE("generation: what the callback throws comes through") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session session = opened(folder, 1);
  crt::Generation generation = session.generate({{10}}, going_on(), [](auto, auto, auto&) -> bool {
    throw std::logic_error("the application's own");
  });
  std::int64_t token = 0;
  CHECK_THROWS_AS(generation.next(&token), std::logic_error);
}

TEST_CASE("generation: sampling, text and stop strings allocate nothing per token") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const auto allocations = [](const std::function<void()>& call) {
    const std::size_t before = crt_test::allocations();
    for (int time = 0; time < 8; ++time) call();
    return crt_test::allocations() - before;
  };
  crt::Session by_hand = opened(folder, 1);
  by_hand.prefill({{10, 20, 30}});
  std::int64_t token = 40;
  const auto step = [&] { by_hand.step(&token, 1); };
  step();
  step();
  crt::GenerationOptions options = sampled();
  if (crt::Bundle::load(folder, true).config().tokenizer == "byte") options.stop_strings = {"never to be found here"};
  crt::Session session = opened(folder, 1);
  crt::Generation generation = session.generate({{10, 20, 30}}, options);
  const auto next = [&] { generation.next(&token); };
  next();
  next();
  next();
  const std::size_t bare = allocations(step);
  CHECK(allocations(next) == bare);
  CHECK(generation.stop_reason(0) == StopReason::running);
}

TEST_CASE("generation: what cannot be done is refused before the model runs") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::Session session = opened(folder, 2);
  const auto vocab = session.vocab_size();
  const auto capacity = session.capacity();
  CHECK(refusal(session, {}, going_on()).find("row 1: empty prompt") != std::string::npos);
  CHECK(refusal(session, {{1}, {}}, going_on()).find("row 1: empty prompt") != std::string::npos);
  CHECK(refusal(session, {{1}}, going_on()).find("batch is 2, found 1") != std::string::npos);
  CHECK(refusal(session, {{1}, {vocab}}, going_on()).find("outside the vocabulary") != std::string::npos);
  CHECK(refusal(session, {{1}, {1, 2}}, going_on(capacity - 1)).find("row 1: 0 tokens in the cache and " +
                                                                     std::to_string(capacity + 1)) !=
        std::string::npos);
  CHECK(refusal(session, {{1}, {1}}, going_on(INT64_MAX)).find("exceed the capacity") != std::string::npos);
  crt::GenerationOptions wrong;
  wrong.max_new_tokens = 0;
  wrong.stop_tokens = {-1};
  wrong.stop_strings = {"", "\xFF"};
  wrong.passes = -3;
  CHECK(refusal(session, {{1}, {1}}, wrong).find("5 problems") != std::string::npos);
  crt::GenerationOptions never;
  never.stop_tokens = {vocab, 0, vocab + 1};
  CHECK(refusal(session, {{1}, {1}}, never).find("2 problems") != std::string::npos);
  crt::GenerationOptions cold;
  cold.sampling.temperature = -1.0;
  CHECK(refusal(session, {{1}, {1}}, cold).find("temperature") != std::string::npos);
  CHECK(session.position()[0] == 0);
}

TEST_CASE("generation: a session that was reset while it was being read has no token to give") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  for (const auto& with : {going_on, sampled}) {
    crt::Session session = opened(folder, 1);
    crt::Generation generation = session.generate({{10}}, with(kNew));
    std::int64_t token = 0;
    CHECK(generation.next(&token));
    session.reset();
    CHECK_THROWS_AS(generation.next(&token), crt::Error);
  }
}
