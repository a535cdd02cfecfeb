// The C++ twin of crt_export/selftest/replay.py.
#include "crt_runtime/selftest.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <utility>

#include "bundle/bundle_files.hpp"
#include "crt_runtime/bundle.hpp"
#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"
#include "selftest/replay.hpp"
#include "selftest/vectors.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

/// Steps after a prompt whose result earlier replays have shown to be the vectors': enough to see the state go on.
constexpr std::int64_t kFewSteps = 2;
constexpr int kExitOff = 1;
constexpr int kExitNotRun = 3;

SelftestVectors vectors_of(BundleFiles& files) {
  if (!files.contains(kVectorsFile)) {
    throw Error(ErrorKind::bundle, files.path() + " has no " + kVectorsFile +
                                       ", which every build writes; build it again with 'crt-export build'");
  }
  return SelftestVectors::load(files.held(kVectorsFile), files.config(), files.checkpoint());
}

/// The same sequence of bits in both; where they differ, the largest difference.
std::optional<double> difference(const std::vector<float>& before, const std::vector<float>& after) {
  if (before.size() == after.size() &&
      (before.empty() || std::memcmp(before.data(), after.data(), before.size() * sizeof(float)) == 0)) {
    return std::nullopt;
  }
  double largest = 0.0;
  for (std::size_t index = 0; index < std::min(before.size(), after.size()); ++index) {
    const double found = static_cast<double>(before[index]) - static_cast<double>(after[index]);
    largest = std::max(largest, found < 0 ? -found : found);
  }
  return largest;
}

/// One target on one session, with a reset between replays: what it carries across shows in the next one.
class TargetRun {
 public:
  TargetRun(Session& session, const Target& target, const SelftestVectors& vectors, bool iterated)
      : session_(session), target_(target), vectors_(vectors), iterated_(iterated) {}

  std::vector<SelftestReplay> replays();

 private:
  SelftestReplay compared(const std::string& run, const Feeding& feeding, double limit);
  SelftestReplay repeated(Feeding feeding);
  /// Run one replay; how it failed, if it did.
  std::vector<std::string> observe(const Feeding& feeding, std::vector<Observed>* seen, Comparison* comparison);

  Session& session_;
  const Target& target_;
  const SelftestVectors& vectors_;
  bool iterated_;
  std::vector<Observed> by_prefill_;
};

std::vector<SelftestReplay> TargetRun::replays() {
  const auto limit = vectors_.limits().find(target_.precision);
  if (limit == vectors_.limits().end()) {
    throw Error(ErrorKind::bundle,
                "the self-test vectors have no limit for " + target_.precision + " of " + target_.name);
  }
  const std::int64_t chunk = std::min(vectors_.prompt(), target_.max_tokens);
  const std::string run = prefill_run(target_.unroll.value_or(1), chunk);
  if (!vectors_.has_run(run)) {
    throw Error(ErrorKind::bundle, "the self-test vectors have no run '" + run + "' for " + target_.name + ", only " +
                                       joined(vectors_.runs()) + "; build the bundle again");
  }
  const std::int64_t steps = vectors_.steps();
  const std::int64_t passes = iterated_ && target_.device == "cpu" ? target_.unroll.value_or(0) : 0;
  std::vector<SelftestReplay> results;
  results.push_back(compared(kRecurrence, {Feed::step, chunk, steps}, limit->second));
  results.push_back(compared(run, {Feed::prefill, chunk, steps, passes}, limit->second));
  const bool has_pass = target_.engines.empty() && target_.graphs.count(names::kGraphPrefillPass) != 0;
  if (iterated_ && has_pass) {
    const Feeding feeding{Feed::prefill_pass, chunk, std::min(steps, kFewSteps)};
    results.push_back(compared(kRecurrence, feeding, limit->second));
  }
  results.push_back(repeated({Feed::prefill, chunk, std::min(steps, kFewSteps), passes}));
  return results;
}

SelftestReplay TargetRun::compared(const std::string& run, const Feeding& feeding, double limit) {
  Comparison comparison(vectors_, run, target_.precision, limit);
  std::vector<Observed> seen;
  const std::vector<std::string> failed = observe(feeding, &seen, &comparison);
  if (feeding.by == Feed::prefill) by_prefill_ = std::move(seen);
  session_.reset();
  SelftestReplay result{feed_name(feeding.by), comparison.tensors(), comparison.failures()};
  result.failures.insert(result.failures.end(), failed.begin(), failed.end());
  return result;
}

SelftestReplay TargetRun::repeated(Feeding feeding) {
  std::vector<Observed> again;
  std::vector<std::string> failures = observe(feeding, &again, nullptr);
  for (std::size_t index = 0; index < std::min(again.size(), by_prefill_.size()) && failures.empty(); ++index) {
    const auto check = [&](const std::string& tensor, const std::vector<float>& before,
                           const std::vector<float>& after) {
      const std::optional<double> largest = difference(before, after);
      if (largest && failures.empty()) {
        failures.push_back(tensor + " " + place(vectors_, static_cast<std::int64_t>(index)) + " differs by up to " +
                           three_digits(*largest) + " from the same tokens before reset(), expected the same bits");
      }
    };
    const Observed& before = by_prefill_[index];
    for (std::size_t cache = 0; cache < before.caches.size(); ++cache) {
      check(before.caches[cache].name, before.caches[cache].values, again[index].caches[cache].values);
    }
    check("logits", before.logits, again[index].logits);
    for (std::size_t state = 0; state < before.states.size(); ++state) {
      check(before.states[state].first, before.states[state].second, again[index].states[state].second);
    }
  }
  return {"reset", {}, failures};
}

std::vector<std::string> TargetRun::observe(const Feeding& feeding, std::vector<Observed>* seen,
                                            Comparison* comparison) {
  try {
    replay(session_, vectors_, feeding, [&](Observed observed) {
      if (comparison != nullptr) comparison->add(observed);
      seen->push_back(std::move(observed));
    });
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::bundle) {  // a graph that is loaded on demand differs from what was built
      throw;
    }
    return {"failed " + place(vectors_, static_cast<std::int64_t>(seen->size()), "at") + ": " + error.what()};
  }
  if (comparison != nullptr) comparison->add_caches(seen->back());
  return {};
}

SelftestTarget target_result(Bundle& bundle, const Target& target, const SelftestVectors& vectors) {
  SelftestTarget result;
  result.target = target.name;
  SessionOptions options;
  if (target.engines.empty()) {  // as large as the vectors need; a compiled engine has one capacity
    options.capacity = static_cast<std::int64_t>(vectors.input_ids().size());
  }
  try {
    Session session = bundle.session(target.name, options);
    result.replays = TargetRun(session, target, vectors, bundle.config().iterated).replays();
  } catch (const Error& error) {
    if (error.kind() == ErrorKind::missing_dependency || error.kind() == ErrorKind::unsupported) {
      result.reason = error.what();
      return result;
    }
    if (error.kind() == ErrorKind::bundle) throw;
    result.replays.push_back({"open", {}, {error.what()}});
  }
  const bool off = std::any_of(result.replays.begin(), result.replays.end(),
                               [](const SelftestReplay& replay) { return !replay.failures.empty(); });
  result.status = off ? SelftestStatus::failed : SelftestStatus::passed;
  return result;
}

}  // namespace

SelftestReport run_selftest(const std::string& bundle, const std::vector<std::string>& targets) {
  BundleFiles files = BundleFiles::open(bundle, true);
  for (const std::string& name : targets) {
    files.target(name);  // throws for an unknown one
  }
  const SelftestVectors vectors = vectors_of(files);
  Bundle opened = Bundle::load(bundle, true);
  if (opened.identity() != files.identity()) {
    throw Error(ErrorKind::bundle, files.path() + " was replaced while it was opened; run the self-test again");
  }
  SelftestReport report;
  report.bundle = files.identity();
  report.validated = files.validated();
  report.asked = targets;
  for (const std::string& name : files.target_names()) {
    if (targets.empty() || std::find(targets.begin(), targets.end(), name) != targets.end()) {
      report.targets.push_back(target_result(opened, files.target(name), vectors));
    }
  }
  return report;
}

std::vector<std::string> SelftestReport::failures() const {
  std::vector<std::string> failures;
  for (const SelftestTarget& target : targets) {
    for (const SelftestReplay& replay : target.replays) {
      for (const std::string& failure : replay.failures) {
        failures.push_back(target.target + ", " + replay.replay + ": " + failure);
      }
    }
  }
  return failures;
}

int SelftestReport::exit_code() const noexcept {
  const auto any = [this](SelftestStatus status) {
    return std::any_of(targets.begin(), targets.end(),
                       [status](const SelftestTarget& target) { return target.status == status; });
  };
  if (any(SelftestStatus::failed)) return kExitOff;
  const bool complete = asked.empty() || !any(SelftestStatus::not_run);
  return any(SelftestStatus::passed) && complete ? 0 : kExitNotRun;
}

}  // namespace crt
