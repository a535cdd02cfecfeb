#include "selftest/replay.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <locale>
#include <sstream>
#include <utility>

#include "engine/engine.hpp"
#include "session/floats.hpp"
#include "session/snapshot.hpp"

namespace crt {
namespace {

std::vector<float> floats_of(const SnapshotTensor& tensor) {
  if (tensor.dtype != "F16") return values_of<float>(tensor);
  std::vector<float> values;
  for (const std::uint16_t half : values_of<std::uint16_t>(tensor)) {
    values.push_back(static_cast<float>(double_from_float16(half)));
  }
  return values;
}

Observed observed(Session& session, std::int64_t index) {
  Observed found;
  found.index = index;
  const float* logits = session.logits();
  found.logits.assign(logits, logits + session.vocab_size());
  found.next_token = *session.next_tokens();
  const Snapshot snapshot = session.snapshot();
  const std::string prefix = "past_key_values.";
  for (const SnapshotTensor& tensor : snapshot.tensors) {
    if (tensor.name.substr(0, tensor.name.find('.')) == "state") {
      found.states.emplace_back(tensor.name, floats_of(tensor));
    } else if (tensor.name.compare(0, prefix.size(), prefix) == 0) {
      // Session::snapshot() gives keys and values of every cache in turn.
      const bool is_value = found.caches.size() % 2 == 1;
      Shape shape(tensor.shape.begin() + 1, tensor.shape.end());
      found.caches.push_back({tensor.name, is_value, std::move(shape), floats_of(tensor)});
    }
  }
  return found;
}

}  // namespace

const char* feed_name(Feed feed) noexcept {
  switch (feed) {
    case Feed::step: return "step";
    case Feed::prefill: return "prefill";
    case Feed::prefill_pass:
      break;
  }
  return "prefill_pass";
}

void replay(Session& session, const SelftestVectors& vectors, const Feeding& feeding,
            const std::function<void(Observed)>& look) {
  const std::vector<std::int64_t>& ids = vectors.input_ids();
  const auto rest = ids.begin() + vectors.prompt();
  const std::vector<std::int64_t> prompt(ids.begin(), rest);
  if (feeding.by == Feed::step) {
    for (const std::int64_t token : prompt) session.step({token});
  } else {
    PrefillOptions options;
    options.chunk = feeding.chunk;
    // Chunks need as many passes as they have tokens.
    options.passes = feeding.by == Feed::prefill ? feeding.passes : std::min(vectors.prompt(), feeding.chunk);
    session.prefill({prompt}, options);
  }
  look(observed(session, 0));
  for (std::int64_t index = 1; index <= feeding.steps; ++index) {
    session.step({*(rest + index - 1)});
    look(observed(session, index));
  }
}

std::string place(const SelftestVectors& vectors, std::int64_t index, const char* preposition) {
  return std::string(preposition) + (index == 0 ? " the prompt of " + std::to_string(vectors.prompt()) + " tokens"
                                                : " step " + std::to_string(index));
}

namespace {

constexpr double kTiny = static_cast<double>(std::numeric_limits<float>::min());

/// The larger one; NaN above all.
double worse(double a, double b) noexcept { return b > a || std::isnan(b) ? b : a; }

double largest_value(const std::vector<float>& values) noexcept {
  double largest = kTiny;
  for (const float value : values) largest = std::max(largest, std::abs(static_cast<double>(value)));
  return largest;
}

double largest_difference(const float* found, const float* expected, std::size_t count) noexcept {
  double largest = 0.0;
  for (std::size_t index = 0; index < count && !std::isnan(largest); ++index) {
    largest = worse(largest, std::abs(static_cast<double>(found[index]) - static_cast<double>(expected[index])));
  }
  return largest;
}

}  // namespace

std::string three_digits(double value) {
  std::ostringstream text;
  text.imbue(std::locale::classic());
  text.precision(3);
  text << value;
  return text.str();
}

Comparison::Comparison(const SelftestVectors& vectors, std::string run, std::string precision, double limit)
    : vectors_(vectors), run_(std::move(run)), precision_(std::move(precision)), limit_(limit) {}

void Comparison::add(const Observed& observed) {
  const std::int64_t index = observed.index;
  const std::string where = place(vectors_, index);
  const std::vector<float>& expected = vectors_.values(run_ + ".logits." + std::to_string(index));
  const std::int64_t stride = vectors_.column_stride(index);
  std::vector<float> found;
  for (auto column = vectors_.first_column(index); column < static_cast<std::int64_t>(observed.logits.size());
       column += stride) {
    found.push_back(observed.logits[static_cast<std::size_t>(column)]);
  }
  record("logits", largest_difference(found.data(), expected.data(), expected.size()), where);
  for (const auto& [name, values] : observed.states) {
    const float* state = vectors_.values(run_ + "." + name).data() + static_cast<std::size_t>(index) * values.size();
    record(name, largest_difference(values.data(), state, values.size()), where);
  }
  check_token(observed);
}

void Comparison::add_caches(const Observed& observed) {
  std::size_t number = 0;  // keys and values in turn
  for (const ObservedCache& cache : observed.caches) {
    const std::string divisor = divisor_name(precision_, number++ / 2);
    const std::int64_t tokens_so_far = vectors_.prompt() + observed.index;
    if (cache.shape[1] != tokens_so_far) {
      missing_.push_back(cache.name + " " + place(vectors_, observed.index) + " holds " +
                         std::to_string(cache.shape[1]) + " tokens, expected " + std::to_string(tokens_so_far));
      continue;
    }
    const bool divided = cache.is_value && vectors_.has_values(divisor);
    const std::vector<float>& stored = vectors_.values(run_ + "." + cache.name);
    const auto heads = static_cast<std::size_t>(cache.shape[0]);
    const auto tokens = static_cast<std::size_t>(cache.shape[1]);
    const auto head_dim = static_cast<std::size_t>(cache.shape[2]);
    const auto all_tokens = static_cast<std::size_t>(vectors_.prompt() + vectors_.steps());
    double largest = 0.0;
    std::size_t position = 0;
    std::vector<float> found(head_dim);
    for (std::size_t head = 0; head < heads; ++head) {
      for (std::size_t token = 0; token < tokens; ++token) {
        const float* expected = stored.data() + (head * all_tokens + token) * head_dim;
        const float* values = cache.values.data() + (head * tokens + token) * head_dim;
        std::copy(values, values + head_dim, found.begin());
        for (std::size_t dim = 0; divided && dim < head_dim; ++dim) {
          found[dim] *= vectors_.values(divisor)[head * head_dim + dim];
        }
        const double difference = largest_difference(found.data(), expected, head_dim);
        if (!(difference <= largest) && !std::isnan(largest)) {
          largest = difference;
          position = token;
        }
      }
    }
    record(cache.name, largest, "at position " + std::to_string(position));
  }
}

double Comparison::scale_of(const std::string& tensor) const {
  if (tensor != "logits") return largest_value(vectors_.values(run_ + "." + tensor));
  double scale = kTiny;
  for (std::int64_t index = 0; index <= vectors_.steps(); ++index) {
    scale = std::max(scale, largest_value(vectors_.values(run_ + ".logits." + std::to_string(index))));
  }
  return scale;
}

void Comparison::record(const std::string& tensor, double difference, const std::string& where) {
  auto entry = std::find_if(largest_.begin(), largest_.end(),
                            [&tensor](const Largest& largest) { return largest.tensor == tensor; });
  if (entry == largest_.end()) entry = largest_.insert(largest_.end(), Largest{tensor, 0.0, "", "", 0});
  const double scale = scale_of(tensor);
  const double error = difference / scale;
  if (!(error <= entry->error)) {  // NaN too
    entry->error = error;
    entry->where = where;
  }
  if (!(error <= limit_)) {
    ++entry->beyond;
    if (entry->first.empty()) {
      entry->first = tensor + " " + where + " is off by " + three_digits(error) + " of the largest |value| " +
                     three_digits(scale) + ", the limit is " + three_digits(limit_);
    }
  }
}

void Comparison::check_token(const Observed& observed) {
  const std::string where = place(vectors_, observed.index);
  const auto best = std::max_element(observed.logits.begin(), observed.logits.end());
  const std::int64_t own = best - observed.logits.begin();
  if (observed.next_token != own) {
    tokens_.push_back("next_token " + where + " is " + std::to_string(observed.next_token) +
                      ", but its own largest logit is " + std::to_string(own) + "'s");
  }
  const auto index = static_cast<std::size_t>(observed.index);
  const std::int64_t expected = vectors_.numbers(run_ + ".next_tokens")[index];
  const auto margin = static_cast<double>(vectors_.values(run_ + ".margins")[index]);
  // Two logits that are each within the limit can swap places only where they are as close as this.
  const double near_tie = 2 * limit_ * scale_of("logits");
  if (own != expected && margin > near_tie) {
    tokens_.push_back("next_token " + where + " is " + std::to_string(own) + ", expected " + std::to_string(expected) +
                      ", whose logit leads by " + three_digits(margin) + " (a lead of " + three_digits(near_tie) +
                      " or less is a near tie)");
  }
}

std::vector<SelftestTensor> Comparison::tensors() const {
  std::vector<SelftestTensor> tensors;
  for (const Largest& largest : largest_) tensors.push_back({largest.tensor, largest.error, largest.where, limit_});
  return tensors;
}

std::vector<std::string> Comparison::failures() const {
  std::vector<std::string> failures;
  for (const Largest& largest : largest_) {
    if (largest.beyond > 0) {
      failures.push_back(largest.first + (largest.beyond == 1 ? std::string()
                                                              : ", and " + std::to_string(largest.beyond - 1) +
                                                                    " times more, at most " +
                                                                    three_digits(largest.error)));
    }
  }
  failures.insert(failures.end(), tokens_.begin(), tokens_.end());
  failures.insert(failures.end(), missing_.begin(), missing_.end());
  return failures;
}

}  // namespace crt
