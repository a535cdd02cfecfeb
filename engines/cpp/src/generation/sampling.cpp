// Follows the numbered specification in crt_export/runtime/sampling.py operation by operation. Compiled with
// -ffp-contract=off: a fused multiply-add would change the last bit of a weight and, now and then, a token.
#include "crt_runtime/sampling.hpp"

#include <algorithm>
#include <cfloat>
#include <charconv>
#include <cmath>
#include <limits>
#include <string>

#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

#if defined(__FAST_MATH__)
#error "sampling.cpp must not be compiled with -ffast-math: it has to round as the specification says"
#endif
static_assert(FLT_EVAL_METHOD == 0, "double arithmetic must round every operation to double (not x87)");
static_assert(std::numeric_limits<double>::is_iec559, "the specification needs IEEE 754 doubles");

namespace crt {
namespace {

constexpr double kSmallestExponent = -700.0;
constexpr double kPerLn2 = 1.4426950408889634;
// ln 2 in two parts; the first ends in 21 zero bits, so that a small whole number times it is exact.
constexpr double kLn2High = 6.93147180369123816490e-01;
constexpr double kLn2Low = 1.90821492927058770002e-10;
// 1.5 * 2^52: adding it leaves no bits for a fraction, so the sum rounds to a whole number, halves to the even one.
constexpr double kRounder = 6755399441055744.0;
// exp(-40) is below 2^-57, and sums of weights start at 1: adding such a weight never changes a sum, so its place is
// never drawn and never the first to reach a bound. Leaving these tokens out gives the same token for less sorting.
constexpr double kWithoutEffect = -40.0;

constexpr double kReciprocalFactorials[] = {
    1.0,
    1.0,
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5040.0,
    1.0 / 40320.0,
    1.0 / 362880.0,
    1.0 / 3628800.0,
    1.0 / 39916800.0,
    1.0 / 479001600.0,
    1.0 / 6227020800.0,
};

std::string text_of(double value) {
  char digits[32];
  const auto end = std::to_chars(digits, digits + sizeof digits, value).ptr;
  return std::string(digits, end);
}

[[noreturn]] void refuse_logits(std::uint32_t row, double largest) {
  throw Error(ErrorKind::contract, "cannot choose a token for row " + std::to_string(row) +
                                       ": its logits are not finite (largest: " + text_of(largest) + ")");
}

/// Values of step 1 into values; the id of the largest, the lowest of equals.
std::size_t penalise(const float* logits, const std::uint8_t* seen, double penalty, std::uint32_t row,
                     std::vector<double>& values) {
  const bool penalises = seen != nullptr && penalty != 1.0;
  std::size_t largest = 0;
  for (std::size_t id = 0; id < values.size(); ++id) {
    double value = static_cast<double>(logits[id]);
    if (penalises && seen[id] != 0) value = value > 0.0 ? value / penalty : value * penalty;
    if (std::isnan(value)) refuse_logits(row, value);
    values[id] = value;
    if (value > values[largest]) largest = id;
  }
  if (!std::isfinite(values[largest])) refuse_logits(row, values[largest]);
  return largest;
}

}  // namespace

void SamplingOptions::check() const {
  std::vector<std::string> problems;
  if (!(std::isfinite(temperature) && temperature >= 0.0)) {
    problems.push_back("temperature must be a finite number of at least 0, found " + text_of(temperature));
  }
  if (top_k < 0) problems.push_back("top_k must be at least 0 (0 keeps all tokens), found " + std::to_string(top_k));
  if (!(top_p > 0.0 && top_p <= 1.0)) {
    problems.push_back("top_p must be above 0 and at most 1, found " + text_of(top_p));
  }
  if (!(min_p >= 0.0 && min_p <= 1.0)) problems.push_back("min_p must be between 0 and 1, found " + text_of(min_p));
  if (!(std::isfinite(repetition_penalty) && repetition_penalty > 0.0)) {
    problems.push_back("repetition_penalty must be a finite number above 0, found " + text_of(repetition_penalty));
  }
  refuse_problems(ErrorKind::input, "sampling options", problems);
}

std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                        std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key[0] += 0x9E3779B9U;
    key[1] += 0xBB67AE85U;
  }
  return counter;
}

double uniform(std::uint32_t seed, std::uint32_t row, std::uint64_t step) noexcept {
  const auto words =
      philox4x32({static_cast<std::uint32_t>(step), static_cast<std::uint32_t>(step >> 32), 0, 0}, {seed, row});
  const std::uint64_t bits = (std::uint64_t{words[0]} << 32 | words[1]) >> 11;
  return static_cast<double>(bits) * 0x1p-53;
}

double specified_exp(double x) noexcept {
  if (!(x >= kSmallestExponent)) return 0.0;
  const double power = (x * kPerLn2 + kRounder) - kRounder;
  const double rest = (x - power * kLn2High) - power * kLn2Low;
  double result = kReciprocalFactorials[13];
  for (int n = 12; n >= 0; --n) result = result * rest + kReciprocalFactorials[n];
  return std::ldexp(result, static_cast<int>(power));
}

Sampler::Sampler(std::size_t vocab) : values_(vocab), ids_(vocab), cumulative_(vocab) {}

std::int64_t Sampler::sample(const float* logits, const std::uint8_t* seen, const SamplingOptions& options,
                             std::uint32_t row, std::uint64_t step) {
  if (values_.empty()) throw Error(ErrorKind::input, "vocab must be at least 1, found 0");
  const std::size_t likeliest = penalise(logits, seen, options.repetition_penalty, row, values_);
  if (options.greedy()) return static_cast<std::int64_t>(likeliest);
  const double largest = values_[likeliest];
  const std::size_t kept = rank(largest, options);
  const std::size_t last = accumulate(kept, largest, options);
  const double target = uniform(options.seed, row, step) * cumulative_[last];
  const auto begin = cumulative_.cbegin();
  const auto chosen = std::upper_bound(begin, begin + static_cast<std::ptrdiff_t>(last), target) - begin;
  return ids_[static_cast<std::size_t>(chosen)];
}

std::size_t Sampler::rank(double largest, const SamplingOptions& options) {
  auto end = ids_.begin();
  for (std::size_t id = 0; id < values_.size(); ++id) {
    if ((values_[id] - largest) / options.temperature >= kWithoutEffect) *end++ = static_cast<std::int64_t>(id);
  }
  const auto before = [this](std::int64_t left, std::int64_t right) {
    const double left_value = values_[static_cast<std::size_t>(left)];
    const double right_value = values_[static_cast<std::size_t>(right)];
    return left_value > right_value || (left_value == right_value && left < right);
  };
  if (options.top_k > 0 && options.top_k < end - ids_.begin()) {
    const auto cut = ids_.begin() + static_cast<std::ptrdiff_t>(options.top_k);
    std::nth_element(ids_.begin(), cut, end, before);
    end = cut;
  }
  std::sort(ids_.begin(), end, before);
  return static_cast<std::size_t>(end - ids_.begin());
}

std::size_t Sampler::accumulate(std::size_t kept, double largest, const SamplingOptions& options) {
  std::size_t min_p_end = kept;
  double sum = 0.0;
  double first_weight = 0.0;
  for (std::size_t place = 0; place < kept; ++place) {
    const double value = values_[static_cast<std::size_t>(ids_[place])];
    const double weight = specified_exp((value - largest) / options.temperature);
    if (place == 0) first_weight = weight;
    if (min_p_end == kept && weight < options.min_p * first_weight) min_p_end = place;
    sum = place == 0 ? weight : sum + weight;
    cumulative_[place] = sum;
  }
  std::size_t last = kept - 1;
  if (options.top_p < 1.0) {
    const auto begin = cumulative_.cbegin();
    const auto end = begin + static_cast<std::ptrdiff_t>(kept);
    last = static_cast<std::size_t>(std::lower_bound(begin, end, options.top_p * sum) - begin);
  }
  return std::min(last, min_p_end - 1);
}

}  // namespace crt
