// The self-test: does this machine compute what PyTorch computed when the bundle was built?
#pragma once

#include <string>
#include <vector>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// The largest error of one tensor in one replay.
struct SelftestTensor {
  std::string tensor;    ///< "logits", "state" or "state.{name}", "past_key_values.{i}.key" or ".value"
  double largest = 0.0;  ///< largest |difference| over the largest |value| of the vectors
  std::string where;     ///< after which step, at which position
  double limit = 0.0;    ///< what largest may be
};

/// One replay of the vectors: "step", "prefill", "prefill_pass" or "reset"; "open" where no session could be opened.
struct SelftestReplay {
  std::string replay;
  std::vector<SelftestTensor> tensors;
  std::vector<std::string> failures;  ///< which tensor at which step is off
};

enum class SelftestStatus {
  passed,
  failed,
  not_run,  ///< this machine, or this build of the library, lacks what the target needs
};

struct SelftestTarget {
  std::string target;
  SelftestStatus status = SelftestStatus::not_run;
  std::string reason;  ///< why it did not run
  std::vector<SelftestReplay> replays;
};

struct SelftestReport {
  std::string bundle;              ///< identity of the bundle
  bool validated = false;          ///< whether it was shown to agree with PyTorch when it was built
  std::vector<SelftestTarget> targets;
  std::vector<std::string> asked;  ///< targets that had to run

  /// Sentences that name target, replay, tensor and step.
  std::vector<std::string> failures() const;
  /// 0 passed, 1 a target is off, 3 no target ran, or one that was asked for cannot run here.
  int exit_code() const noexcept;
  bool passed() const noexcept { return exit_code() == 0; }
};

/// Replay the vectors of a bundle (selftest/vectors.safetensors, made by PyTorch FP32) on every target that this
/// library runs, or on those that are asked for. An unvalidated bundle may be given. Throws Error(bundle) if the bundle
/// or its vectors are missing, damaged or too new, Error(input) for an unknown target.
SelftestReport run_selftest(const std::string& bundle, const std::vector<std::string>& targets = {});

}  // namespace crt
