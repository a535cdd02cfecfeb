#include "session/prefill_rule.hpp"

#include <algorithm>
#include <limits>

#include "crt_runtime/error.hpp"

namespace crt {

namespace {

[[noreturn]] void out_of_range(const char* name, const std::string& limits, std::int64_t found) {
  throw Error(ErrorKind::input,
              std::string(name) + " must be at least 1" + limits + ", found " + std::to_string(found));
}

void check_passes(const PrefillPlan& plan, std::int64_t passes, bool recurrent, const std::string& target) {
  if (passes < kAdaptive) {
    out_of_range("passes", "", passes);
  }
  if (!recurrent && (passes > 0 || passes == kAdaptive)) {
    throw Error(ErrorKind::unsupported,
                "passes: a plain transformer has exactly one pass, which is exact; leave passes out");
  }
  if (passes == kAdaptive && !plan.residual_bound) {
    throw Error(ErrorKind::unsupported,
                target + " has no bound for the residual, so there is no telling when passes may stop: its bundle was "
                         "built without a text that the model predicts, or by an earlier version; give a number of "
                         "passes or 'exact'");
  }
}

/// As numpy compares a float32 with a number: in float32.
float float_from(double bound) {
  return static_cast<float>(std::min(bound, static_cast<double>(std::numeric_limits<float>::max())));
}

}  // namespace

PrefillRule prefill_rule(const PrefillPlan& plan, const PrefillOptions& options, std::int64_t most, bool recurrent,
                         std::int64_t unroll, const std::string& target) {
  const std::int64_t passes = options.passes;
  check_passes(plan, passes, recurrent, target);
  if (options.chunk < 0 || options.chunk > most) {
    out_of_range("chunk", " and at most " + std::to_string(most), options.chunk);
  }
  PrefillRule rule;
  rule.chunk = most;
  if (passes == kTargetsChoice || passes == kAdaptive) {
    rule.chunk = std::min(plan.chunk.value_or(most), most);
  }
  rule.chunk = options.chunk == 0 ? rule.chunk : options.chunk;
  if (passes > 0) {
    rule.passes = passes == unroll ? 0 : passes;
    return rule;
  }
  const bool by_steps = passes == kExact || (passes == kTargetsChoice && plan.method == PrefillMethod::steps);
  if (recurrent && by_steps) {
    rule.shortest = std::numeric_limits<std::int64_t>::max();
    return rule;
  }
  rule.passes = plan.passes.value_or(0);
  rule.shortest = recurrent ? plan.shortest : 1;
  if (plan.residual_bound && (passes == kAdaptive || plan.method == PrefillMethod::adaptive)) {
    rule.bound = float_from(*plan.residual_bound);
    rule.passes = plan.passes.value_or(unroll);  // the unrolled graph cannot stop
  }
  return rule;
}

}  // namespace crt
