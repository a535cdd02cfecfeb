// A step allocates nothing after warm-up, beyond what ONNX Runtime itself does in a bare run of the same graph.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <vector>

#include "allocation_count.hpp"
#include "crt_runtime/session.hpp"
#include "engine/back_ends.hpp"
#include "given_bundle.hpp"
#include "session/tensors.hpp"

namespace {

constexpr int kSteps = 8;

std::size_t allocations_of(const std::function<void()>& loop) {
  const std::size_t before = crt_test::allocations();
  loop();
  return crt_test::allocations() - before;
}

crt::SessionOptions one_thread(std::int64_t batch) {
  crt::SessionOptions options;
  options.threads = 1;  // so that everything runs in the thread that counts
  options.batch = batch;
  options.capacity = 32;
  return options;
}

using TokenRows = std::vector<std::vector<std::int64_t>>;

/// What kSteps bare launches of a step of one row allocate, after the same prompts as the session that is compared: how
/// much ONNX Runtime allocates depends on the lengths that a graph has seen.
std::size_t bare_allocations(const crt::ModelConfig& config, const TokenRows& prompts) {
  crt::BundleFiles files = crt::BundleFiles::open(std::getenv("CRT_TEST_BUNDLE"), true);
  const crt::Target& target = files.target("ort-cpu-fp32");
  const std::shared_ptr<crt::Engine> engine = crt::open_engine(files, target, 1);
  const auto batch = static_cast<std::int64_t>(prompts.size());
  const crt::TensorSizes sizes{batch, 32, config, target.cache_dtype, target.unroll.value_or(0)};
  crt::SessionTensors tensors(*engine, sizes);
  std::vector<crt::RowTokens> rows;
  std::int64_t longest = 0;
  for (const std::vector<std::int64_t>& prompt : prompts) {
    rows.push_back({prompt.data(), static_cast<std::int64_t>(prompt.size())});
    longest = std::max(longest, rows.back().count);
  }
  const std::vector<std::int64_t> positions(prompts.size(), 0);
  std::vector<float> residual(prompts.size());
  tensors.prefill(rows, positions.data(), {crt::Batch{0, batch, longest}}, 0, std::nullopt, residual);
  crt::Launch& launch = tensors.step_launch(crt::Batch{0, 1, 1});
  launch.run();
  return allocations_of([&] {
    for (int index = 0; index < kSteps; ++index) {
      launch.run();
    }
  });
}

}  // namespace

TEST_CASE("allocations: operator new is counted at all") {
  CHECK(allocations_of([] { const std::vector<int> three(3, 0); }) == 1);
}

TEST_CASE("allocations: advance(), step(), logits() and a greedy generation add none to the bare launch") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const std::size_t bare = bare_allocations(bundle.config(), {{40, 41}});
  crt::Session session = bundle.session("ort-cpu-fp32", one_thread(1));
  session.prefill({{40, 41}});
  std::int64_t token = 50;
  session.step(&token, 1);  // both parities
  session.step(&token, 1);
  CHECK(allocations_of([&] {
          for (int index = 0; index < kSteps; ++index) {
            token = session.next_tokens()[0];
            session.advance(&token, 1);
          }
        }) == bare);
  CHECK(allocations_of([&] {
          for (int index = 0; index < kSteps; ++index) {
            token = 60 + index;
            session.step(&token, 1);
            static_cast<void>(session.logits());
          }
        }) == bare);
  crt::GenerationOptions options;
  options.ignore_eos = true;
  options.max_new_tokens = kSteps + 2;
  session.reset();
  crt::Generation generation = session.generate({{40, 41}}, options);
  generation.next(&token);
  generation.next(&token);
  CHECK(allocations_of([&] {
          for (int index = 0; index < kSteps; ++index) {
            CHECK_FALSE(!generation.next(&token));
          }
        }) == bare);
}

TEST_CASE("allocations: rows that come and go add none once their launches exist") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  crt::Session session = bundle.session("ort-cpu-fp32", one_thread(3));
  const TokenRows prompts{{40}, {41, 42}, {43}};
  session.prefill(prompts);
  const std::int64_t both_ends[] = {50, crt::kNoToken, 51};
  const std::int64_t middle[] = {crt::kNoToken, 52, crt::kNoToken};
  const auto round = [&] {
    session.step(both_ends, 3);
    session.step(middle, 3);
  };
  round();
  round();
  const std::size_t first = allocations_of(round);
  const std::size_t three_launches = 3 * (bare_allocations(bundle.config(), prompts) / kSteps);
  CHECK(first == three_launches);
}
