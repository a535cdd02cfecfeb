// The sampler against its specification: known answers of Python, and a plain reading of the numbered steps.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "allocation_count.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/sampling.hpp"

namespace {

using crt::Sampler;
using crt::SamplingOptions;
using Words = std::array<std::uint32_t, 4>;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kFloatInfinity = std::numeric_limits<float>::infinity();

/// The specification word for word: everything is ranked, nothing is left out early.
std::int64_t token_by_specification(const std::vector<float>& logits, const std::vector<std::uint8_t>& seen,
                                    const SamplingOptions& options, std::uint32_t row, std::uint64_t step) {
  std::vector<double> values(logits.begin(), logits.end());
  for (std::size_t id = 0; id < values.size(); ++id) {
    if (options.repetition_penalty == 1.0 || seen[id] == 0) continue;
    values[id] = values[id] > 0 ? values[id] / options.repetition_penalty : values[id] * options.repetition_penalty;
  }
  std::vector<std::size_t> ids(values.size());
  std::iota(ids.begin(), ids.end(), std::size_t{0});
  std::stable_sort(ids.begin(), ids.end(), [&](std::size_t a, std::size_t b) { return values[a] > values[b]; });
  if (options.temperature == 0.0) return static_cast<std::int64_t>(ids[0]);
  if (options.top_k > 0) ids.resize(std::min(ids.size(), static_cast<std::size_t>(options.top_k)));
  std::vector<double> weights;
  std::vector<double> sums;
  for (const std::size_t id : ids) {
    weights.push_back(crt::specified_exp((values[id] - values[ids[0]]) / options.temperature));
    sums.push_back(sums.empty() ? weights.back() : sums.back() + weights.back());
  }
  std::size_t last = ids.size() - 1;
  if (options.top_p < 1.0) {
    last = 0;
    while (sums[last] < options.top_p * sums.back()) ++last;
  }
  for (std::size_t place = 0; options.min_p > 0.0 && place <= last; ++place) {
    if (weights[place] < options.min_p * weights[0]) last = place - 1;
  }
  const double target = crt::uniform(options.seed, row, step) * sums[last];
  std::size_t chosen = 0;
  while (chosen < last && sums[chosen] <= target) ++chosen;
  return static_cast<std::int64_t>(ids[chosen]);
}

std::vector<float> logits_of_64() {
  std::vector<float> logits(64);
  for (std::size_t id = 0; id < 64; ++id) logits[id] = static_cast<float>(id * 37 % 101) * 0.0625F;
  return logits;
}

SamplingOptions random_options(std::mt19937_64& random) {
  const auto pick = [&random](std::initializer_list<double> values) {
    return values.begin()[std::uniform_int_distribution<std::size_t>(0, values.size() - 1)(random)];
  };
  SamplingOptions options;
  options.temperature = pick({0.0, 5e-324, 1e-3, 0.5, 0.9, 1.0, 3.0, 100.0, 1e308});
  options.top_k = static_cast<std::int64_t>(pick({0.0, 1.0, 2.0, 5.0, 40.0, 1000.0}));
  options.top_p = pick({1.0, 1.0 - 0x1p-53, 0.95, 0.5, 1e-9});
  options.min_p = pick({0.0, 1e-300, 1e-18, 0.05, 0.7, 1.0});
  options.repetition_penalty = pick({1.0, 1.2, 0.5, 3.0});
  options.seed = static_cast<std::uint32_t>(random());
  return options;
}

std::vector<float> random_logits(std::mt19937_64& random, std::size_t vocab) {
  const double scale = std::vector<double>{0.01, 1.0, 10.0, 1000.0}[random() % 4];
  const bool ties = random() % 3 == 0;
  const bool gaps = random() % 3 == 0;
  std::normal_distribution<double> normal(0.0, scale);
  std::vector<float> logits(vocab);
  for (float& logit : logits) {
    logit = static_cast<float>(ties ? std::round(normal(random) / scale) : normal(random));
    if (gaps && random() % 4 == 0) logit = -kFloatInfinity;
  }
  logits[random() % vocab] = 0.0F;
  return logits;
}

std::string refusal(const SamplingOptions& options) {
  try {
    options.check();
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::input);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("philox4x32: the known answers of its authors") {
  CHECK(crt::philox4x32({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  const std::uint32_t ones = 0xffffffff;
  CHECK(crt::philox4x32({ones, ones, ones, ones}, {ones, ones}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(crt::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("uniform and specified_exp: the bits that Python gets") {
  CHECK(crt::uniform(1, 2, 3) == 0x1.e6d35ac0c9c26p-2);
  CHECK(crt::uniform(0xffffffff, 0, (std::uint64_t{1} << 40) + 5) == 0x1.ad424b44e5100p-4);
  CHECK(crt::specified_exp(-1.0) == 0x1.78b56362cef38p-2);
  CHECK(crt::specified_exp(-0.3) == 0x1.7b4c869c37c05p-1);
  CHECK(crt::specified_exp(-100.25) == 0x1.4acd31e167ebbp-145);
  CHECK(crt::specified_exp(-699.5) == 0x1.c89c2e339b392p-1010);
}

TEST_CASE("specified_exp: no operation is fused with another one") {
  // Over the bits of 10,000 values, from Python. A fused multiply-add changes about every twelfth of them.
  std::uint64_t digest = 0;
  for (int index = 0; index < 10000; ++index) {
    const double value = crt::specified_exp(-(index * 37) / 1024.0);
    std::uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    digest = digest * 1099511628211U ^ bits;
  }
  CHECK(digest == 0x64b8d9f083119a41U);
}

TEST_CASE("specified_exp: exactly 1 at 0, 0 below -700, within one unit in the last place of exp between") {
  CHECK(crt::specified_exp(0.0) == 1.0);
  CHECK(crt::specified_exp(-0.0) == 1.0);
  CHECK(crt::specified_exp(-kInfinity) == 0.0);
  CHECK(crt::specified_exp(std::nextafter(-700.0, -701.0)) == 0.0);
  for (int index = 0; index <= 70000; ++index) {
    const double x = -0.01 * index;
    CHECK(std::abs(crt::specified_exp(x) / std::exp(x) - 1.0) <= 0x1p-52);
  }
}

TEST_CASE("sample: the tokens that Python draws") {
  const auto logits = logits_of_64();
  std::vector<std::uint8_t> seen(64);
  for (std::size_t id = 0; id < 64; id += 3) seen[id] = 1;
  struct Case {
    double temperature;
    std::int64_t top_k;
    double top_p;
    double min_p;
    double penalty;
    std::vector<std::int64_t> tokens;
  };
  const std::vector<Case> cases = {
      {1.0, 0, 1.0, 0.0, 1.0, {60, 24, 16, 13, 16, 30, 4, 49, 60, 19, 10, 49}},
      {0.7, 12, 1.0, 0.0, 1.0, {30, 38, 8, 57, 8, 30, 35, 19, 30, 60, 16, 60}},
      {1.5, 0, 0.8, 0.0, 1.0, {60, 24, 46, 13, 16, 30, 40, 8, 60, 49, 62, 49}},
      {2.0, 0, 1.0, 0.2, 1.0, {19, 2, 24, 21, 35, 30, 56, 38, 60, 8, 59, 38}},
      {1.2, 20, 0.9, 0.05, 1.3, {49, 13, 46, 30, 46, 19, 62, 8, 19, 49, 2, 8}},
  };
  Sampler sampler(64);
  for (const Case& expected : cases) {
    SamplingOptions options;
    options.temperature = expected.temperature;
    options.top_k = expected.top_k;
    options.top_p = expected.top_p;
    options.min_p = expected.min_p;
    options.repetition_penalty = expected.penalty;
    options.seed = 20261122;
    std::vector<std::int64_t> tokens;
    for (std::uint64_t step = 0; step < 12; ++step) {
      tokens.push_back(sampler.sample(logits.data(), seen.data(), options, 3, step));
    }
    CHECK(tokens == expected.tokens);
  }
}

TEST_CASE("sample: what is left out early changes no token") {
  std::mt19937_64 random(7);
  for (int round = 0; round < 4000; ++round) {
    const std::size_t vocab = std::vector<std::size_t>{1, 2, 17, 256}[random() % 4];
    const auto logits = random_logits(random, vocab);
    std::vector<std::uint8_t> seen(vocab);
    for (auto& flag : seen) flag = static_cast<std::uint8_t>(random() % 2);
    const SamplingOptions options = random_options(random);
    const auto row = static_cast<std::uint32_t>(random());
    const std::uint64_t step = random() >> 1;
    CHECK(Sampler(vocab).sample(logits.data(), seen.data(), options, row, step) ==
          token_by_specification(logits, seen, options, row, step));
  }
}

TEST_CASE("sample: ties go to the lower id, 0.0 and -0.0 are equal") {
  const std::vector<float> logits = {-1.0F, -0.0F, 0.0F, -0.0F};
  Sampler sampler(4);
  SamplingOptions options;
  CHECK(sampler.sample(logits.data(), nullptr, options, 0, 0) == 1);
  options.temperature = 1.0;
  options.top_k = 1;
  for (std::uint64_t step = 0; step < 20; ++step) CHECK(sampler.sample(logits.data(), nullptr, options, 0, step) == 1);
}

TEST_CASE("sample: the penalty divides positive logits, multiplies negative ones, and needs seen tokens") {
  SamplingOptions options;
  options.repetition_penalty = 2.0;
  Sampler sampler(2);
  const std::vector<std::uint8_t> first = {1, 0};
  const std::vector<float> positive = {3.0F, 2.0F};
  const std::vector<float> negative = {-1.0F, -1.5F};
  CHECK(sampler.sample(positive.data(), first.data(), options, 0, 0) == 1);
  CHECK(sampler.sample(negative.data(), first.data(), options, 0, 0) == 1);
  CHECK(sampler.sample(positive.data(), nullptr, options, 0, 0) == 0);
}

TEST_CASE("sample: allocates nothing after construction") {
  std::mt19937_64 random(3);
  Sampler sampler(256);
  for (int round = 0; round < 50; ++round) {
    const auto logits = random_logits(random, 256);
    const SamplingOptions options = random_options(random);
    const std::size_t before = crt_test::allocations();
    sampler.sample(logits.data(), nullptr, options, 0, 0);
    CHECK(crt_test::allocations() == before);
  }
}

TEST_CASE("sample: NaN, +inf, nothing finite and an overflowing penalty are refused") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<std::vector<float>> all = {{0.0F, nan}, {nan, 0.0F}, {0.0F, kFloatInfinity},
                                               {-kFloatInfinity, -kFloatInfinity}};
  SamplingOptions options;
  for (const double temperature : {0.0, 1.0}) {
    options.temperature = temperature;
    for (const auto& logits : all) {
      CHECK_THROWS_WITH_AS(Sampler(2).sample(logits.data(), nullptr, options, 5, 0),
                           doctest::Contains("cannot choose a token for row 5"), crt::Error);
    }
    options.repetition_penalty = 5e-324;
    const std::vector<float> large = {1e30F, 1.0F};
    const std::vector<std::uint8_t> seen = {1, 1};
    CHECK_THROWS_AS(Sampler(2).sample(large.data(), seen.data(), options, 0, 0), crt::Error);
    options.repetition_penalty = 1.0;
  }
}

TEST_CASE("SamplingOptions::check lists every value that is out of its range") {
  CHECK(refusal({}) == "");
  SamplingOptions options;
  options.temperature = -1.0;
  options.top_k = -1;
  options.top_p = 0.0;
  options.min_p = 1.5;
  options.repetition_penalty = 0.0;
  const std::string text = refusal(options);
  for (const char* name : {"5 problems", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}) {
    CHECK(text.find(name) != std::string::npos);
  }
  for (const double wrong : {std::nan(""), kInfinity, -kInfinity}) {
    SamplingOptions each;
    each.temperature = each.top_p = each.min_p = each.repetition_penalty = wrong;
    CHECK(refusal(each).find("4 problems") != std::string::npos);
  }
}

TEST_CASE("sampler: without a vocabulary there is nothing to choose from") {
  const float logit = 0.0F;
  try {
    Sampler(0).sample(&logit, nullptr, SamplingOptions(), 0, 0);
    FAIL("a token of none");
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::input);
    CHECK(std::string(error.what()) == "vocab must be at least 1, found 0");
  }
}
