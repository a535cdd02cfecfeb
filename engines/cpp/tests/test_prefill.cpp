// How prompts are taken: the rule of a call, and passes, adaptive passes and steps on a model computed by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "crt_runtime/error.hpp"
#include "session/prefill.hpp"
#include "toy_engine.hpp"

namespace {

using crt::PrefillMethod;
using crt::PrefillOptions;
using crt::PrefillPlan;
using crt_test::ToyControl;
using crt_test::ToyRow;

constexpr std::int64_t kMost = 16;

PrefillPlan adaptive_plan() {
  PrefillPlan plan;
  plan.method = PrefillMethod::adaptive;
  plan.passes = 4;
  plan.chunk = 8;
  plan.shortest = 3;
  plan.residual_bound = 0.5;
  return plan;
}

crt::PrefillRule rule_of(const PrefillPlan& plan, std::int64_t passes, std::int64_t chunk = 0, bool iterated = true) {
  return crt::prefill_rule(plan, PrefillOptions{passes, chunk}, kMost, iterated, 6, "toy");
}

struct Toy {
  explicit Toy(std::int64_t batch = 1, const std::string& state = "hidden") : control(std::make_shared<ToyControl>()) {
    control->one_graph = true;
    control->state = state;
    crt::SessionSetup setup = crt_test::toy_setup(batch, 24);
    setup.sizes.model.states[0].name = state;
    setup.plan = adaptive_plan();
    decoder = std::make_unique<crt::Decoder>(crt_test::make_toy_engine(control), setup);
  }
  void prefill(const std::vector<std::vector<std::int64_t>>& rows, std::int64_t passes) {
    decoder->prefill(rows, decoder->rule_of(PrefillOptions{passes, 0}));
  }
  /// What a row holds is what steps leave: positions among the keys, and the next token.
  void check(std::int64_t row, const std::vector<std::int64_t>& tokens) {
    ToyRow alone;
    alone.feed(tokens);
    const auto index = static_cast<std::size_t>(row);
    CHECK(decoder->next_tokens()[index] == alone.next_token());
    CHECK(decoder->position()[index] == static_cast<std::int64_t>(tokens.size()));
    const std::vector<float> keys = crt_test::floats_of(decoder->tensors().caches().entries(0, 24));
    for (std::size_t at = 0; at < 24; ++at) {
      const bool held = at < tokens.size();
      CHECK(keys[2 * (24 * index + at)] == (held ? static_cast<float>(tokens[at]) + 1.0F : 0.0F));
      CHECK(keys[2 * (24 * index + at) + 1] == (held ? static_cast<float>(at) : 0.0F));
    }
  }

  std::shared_ptr<ToyControl> control;
  std::unique_ptr<crt::Decoder> decoder;
};

}  // namespace

TEST_CASE("prefill rule: the target's choice, unless the call has one of its own") {
  const PrefillPlan none;
  CHECK(rule_of(none, crt::kTargetsChoice).passes == 0);
  CHECK(rule_of(none, crt::kTargetsChoice).chunk == kMost);
  CHECK(rule_of(none, crt::kExact).shortest > kMost);
  CHECK(rule_of(none, crt::kExact, 0, false).shortest == 1);  // the one pass of a model that is not iterated is exact
  const PrefillPlan plan = adaptive_plan();
  const crt::PrefillRule own = rule_of(plan, crt::kTargetsChoice);
  CHECK(own.passes == 4);
  CHECK(own.bound == 0.5F);
  CHECK(own.shortest == 3);
  CHECK(own.chunk == 8);
  CHECK(rule_of(plan, 2).passes == 2);
  CHECK(rule_of(plan, 6).passes == 0);  // as the bundle was built with: the unrolled graph, where there is one
  CHECK_FALSE(rule_of(plan, 2).bound.has_value());
  CHECK(rule_of(plan, 2).shortest == 1);
  CHECK(rule_of(plan, 2).chunk == kMost);
  CHECK(rule_of(plan, crt::kAdaptive, 5).chunk == 5);
  PrefillPlan steps = plan;
  steps.method = PrefillMethod::steps;
  CHECK(rule_of(steps, crt::kTargetsChoice).shortest > kMost);
  CHECK(rule_of(steps, crt::kAdaptive).bound == 0.5F);
  PrefillPlan built = plan;  // as many passes as the bundle was built with
  built.method = PrefillMethod::passes;
  built.passes = std::nullopt;
  CHECK(rule_of(built, crt::kTargetsChoice).passes == 0);
  CHECK_FALSE(rule_of(built, crt::kTargetsChoice).bound.has_value());
  CHECK(rule_of(built, crt::kAdaptive).passes == 6);
  CHECK(rule_of(built, crt::kAdaptive).bound == 0.5F);
  PrefillPlan loose = plan;
  loose.residual_bound = 1e300;
  CHECK(std::isfinite(*rule_of(loose, crt::kAdaptive).bound));
}

TEST_CASE("prefill rule: what is out of range or has no bound is refused") {
  const auto kind_of = [](const PrefillPlan& plan, std::int64_t passes, std::int64_t chunk, bool iterated) {
    try {
      rule_of(plan, passes, chunk, iterated);
    } catch (const crt::Error& error) {
      return error.kind();
    }
    FAIL("it was not refused");
    return crt::ErrorKind::bundle;
  };
  CHECK(kind_of(adaptive_plan(), -3, 0, true) == crt::ErrorKind::input);
  CHECK(kind_of(adaptive_plan(), 1, kMost + 1, true) == crt::ErrorKind::input);
  CHECK(kind_of(adaptive_plan(), 1, -1, true) == crt::ErrorKind::input);
  CHECK(kind_of(PrefillPlan(), crt::kAdaptive, 0, true) == crt::ErrorKind::unsupported);
  CHECK(kind_of(PrefillPlan(), 2, 0, false) == crt::ErrorKind::unsupported);
  CHECK(kind_of(adaptive_plan(), crt::kAdaptive, 0, false) == crt::ErrorKind::unsupported);
}

TEST_CASE("prefill: passes go on until the residual is small, and exact tokens are left out of them") {
  Toy toy;
  toy.control->residuals = {0.9F, 0.7F, 0.5F, 0.1F};
  toy.prefill({{1, 2, 3, 4, 5, 6}}, crt::kTargetsChoice);
  CHECK(toy.control->passes == 3);
  toy.check(0, {1, 2, 3, 4, 5, 6});
}

TEST_CASE("prefill: where the passes do not get there, the rest of the chunk goes token by token") {
  Toy toy;
  toy.control->residuals = {0.9F, 0.8F, 0.7F, 0.6F};
  toy.prefill({{1, 2, 3, 4, 5, 6, 7}}, crt::kAdaptive);
  CHECK(toy.control->passes == 4 + 3);
  toy.check(0, {1, 2, 3, 4, 5, 6, 7});
  toy.decoder->step({8}, {1}, true);
  toy.check(0, {1, 2, 3, 4, 5, 6, 7, 8});
}

TEST_CASE("prefill: a state that the head does not read has iterates of its own") {
  for (const float last : {0.1F, 0.6F}) {  // the passes get there, or the rest goes token by token
    Toy toy(1, "notes");
    toy.control->residuals = {0.9F, 0.8F, 0.7F, last};
    toy.prefill({{1, 2, 3, 4, 5, 6, 7}}, crt::kAdaptive);
    CHECK(toy.control->passes == (last < 0.5F ? 4 : 4 + 3));
    toy.check(0, {1, 2, 3, 4, 5, 6, 7});
    toy.decoder->step({8}, {1}, true);
    toy.check(0, {1, 2, 3, 4, 5, 6, 7, 8});
  }
  Toy toy(1, "notes");
  toy.control->overflowing = 7;
  CHECK_THROWS_WITH(toy.decoder->step({7}, {1}, true), "toy: state.notes is not finite: row 0 after position 0");
}

TEST_CASE("prefill: every row takes as many passes as it needs, and short chunks go token by token") {
  Toy toy(3);
  toy.control->residuals = {0.0F, 0.0F, 0.9F, 0.1F, 0.2F};  // the steps come first, through the same graph
  toy.control->runs = 0;
  toy.prefill({{1, 2, 3, 4}, {5, 6}, {7, 8, 9}}, crt::kTargetsChoice);
  CHECK(toy.control->runs == 2 + 2 + 1);
  toy.check(0, {1, 2, 3, 4});
  toy.check(1, {5, 6});
  toy.check(2, {7, 8, 9});
}

TEST_CASE("prefill: rows of unequal length run one by one in host memory, by any number of passes") {
  for (std::int64_t passes = 1; passes < 8; ++passes) {
    Toy toy(2);
    toy.prefill({{1, 2, 3, 4, 5, 6}, {7, 8, 9}}, passes);
    toy.check(0, {1, 2, 3, 4, 5, 6});
    toy.check(1, {7, 8, 9});
    CHECK(toy.control->passes == std::min<std::int64_t>(passes, 6) + std::min<std::int64_t>(passes, 3));
  }
}

TEST_CASE("prefill: rows of equal length share every pass") {
  Toy toy(2);
  toy.prefill({{1, 2, 3, 4, 5, 6}, {7, 8, 9, 10, 11, 12}}, 4);
  CHECK(toy.control->passes == 4);
}

TEST_CASE("prefill: away from host memory rows of unequal length are padded, and drop what is exact in all of them") {
  for (std::int64_t passes = 1; passes < 8; ++passes) {
    Toy toy(2);
    toy.control->host_memory = false;
    toy.prefill({{1, 2, 3, 4, 5, 6}, {7, 8, 9}}, passes);
    toy.check(0, {1, 2, 3, 4, 5, 6});
    toy.check(1, {7, 8, 9});
    CHECK(toy.control->passes == std::min<std::int64_t>(passes, 6));
  }
}

TEST_CASE("prefill: exact is a step for every token, rows side by side") {
  Toy toy(2);
  toy.control->runs = 0;
  toy.prefill({{1, 2, 3, 4}, {5, 6}}, crt::kExact);
  CHECK(toy.control->runs == 4);
  toy.check(0, {1, 2, 3, 4});
  toy.check(1, {5, 6});
}

TEST_CASE("prefill: a residual that is not a number ends the passes and fails the call") {
  Toy toy;
  toy.control->residuals.assign(4, std::numeric_limits<float>::quiet_NaN());
  CHECK_THROWS_WITH(toy.prefill({{1, 2, 3, 4, 5, 6}}, crt::kAdaptive),
                    "toy: residual is not finite: row 0 after position 5");
  CHECK(toy.control->passes == 4);
}
