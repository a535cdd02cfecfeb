// The self-test: passes on a sound target, says what is off, and gives the exit codes that crt-selftest ends with.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/selftest.hpp"
#include "given_bundle.hpp"
#include "given_folder.hpp"
#include "selftest/replay.hpp"
#include "selftest/vectors.hpp"

namespace {

crt::SelftestReport with(const std::vector<crt::SelftestStatus>& statuses, std::vector<std::string> asked = {}) {
  crt::SelftestReport report;
  for (const crt::SelftestStatus status : statuses) {
    crt::SelftestTarget target;
    target.target = "t" + std::to_string(report.targets.size());
    target.status = status;
    report.targets.push_back(target);
  }
  report.asked = std::move(asked);
  return report;
}

}  // namespace

TEST_CASE("self-test: sound targets pass every replay, with the chunks of each") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const crt::SelftestReport report = crt::run_selftest(folder, {"ort-cpu-fp32", "chunked"});
  CHECK(report.passed());
  CHECK_FALSE(report.validated);
  REQUIRE(report.targets.size() == 2);
  for (const crt::SelftestTarget& target : report.targets) {
    CHECK(target.status == crt::SelftestStatus::passed);
    REQUIRE(target.replays.size() == 4);
    const std::vector<std::string> names{"step", "prefill", "prefill_pass", "reset"};
    for (std::size_t index = 0; index < names.size(); ++index) {
      CHECK(target.replays[index].replay == names[index]);
      CHECK(target.replays[index].failures.empty());
      CHECK(target.replays[index].tensors.size() == (names[index] == "reset" ? 0U : 4U));
      for (const crt::SelftestTensor& tensor : target.replays[index].tensors) {
        CHECK(tensor.largest < 5e-6);
        CHECK(tensor.limit > tensor.largest);
      }
    }
  }
}

TEST_CASE("self-test: what cannot be opened is off, what this library does not run is said") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  const crt::SelftestReport report = crt::run_selftest(folder);
  CHECK(report.exit_code() == 1);
  const auto named = [&report](const std::string& name) {
    return *std::find_if(report.targets.begin(), report.targets.end(),
                         [&name](const crt::SelftestTarget& target) { return target.target == name; });
  };
  CHECK(named("broken").status == crt::SelftestStatus::failed);
  CHECK(named("rtx-sm80-fp16").status != crt::SelftestStatus::passed);
  REQUIRE_FALSE(report.failures().empty());
  CHECK(report.failures().front().find("broken, open: ") == 0);
  const std::string text =
      crt_test::error_text(crt::ErrorKind::input, [folder] { crt::run_selftest(folder, {"none"}); });
  CHECK(text.find("unknown target 'none'") == 0);
}

TEST_CASE("self-test: a cache that lacks a token is off, however right the others are") {
  const char* folder = crt_test::given_folder();
  if (folder == nullptr) return;
  crt::BundleFiles files = crt::BundleFiles::open(folder, true);
  const auto vectors = crt::SelftestVectors::load(files.held(crt::kVectorsFile), files.config(), files.checkpoint());
  crt::Comparison comparison(vectors, crt::kRecurrence, "fp32", 1e-3);
  crt::Observed observed;
  observed.caches.push_back({"past_key_values.0.key", false, {1, 0, 1}, {}});
  comparison.add_caches(observed);
  REQUIRE(comparison.failures().size() == 1);
  CHECK(comparison.failures().front() ==
        "past_key_values.0.key after the prompt of 12 tokens holds 0 tokens, expected 12");
}

TEST_CASE("self-test: exit codes") {
  using crt::SelftestStatus;
  CHECK(with({SelftestStatus::passed, SelftestStatus::not_run}).exit_code() == 0);
  CHECK(with({SelftestStatus::passed, SelftestStatus::not_run}, {"t0", "t1"}).exit_code() == 3);
  CHECK(with({SelftestStatus::failed, SelftestStatus::not_run}, {"t0", "t1"}).exit_code() == 1);
  CHECK(with({SelftestStatus::not_run}).exit_code() == 3);
  CHECK(with({}).exit_code() == 3);
}

TEST_CASE("self-test: numbers have three digits, with a point in every locale") {
  CHECK(crt::three_digits(0.0123456) == "0.0123");
  CHECK(crt::three_digits(2e-5) == "2e-05");
}
