// crt-selftest BUNDLE [TARGET...]: does this machine compute what PyTorch computed when the bundle was built?
//
// Exit codes: 0 passed, 1 a target is off, 2 the bundle is unusable or has no vectors, or the command line is wrong,
// 3 no target runs here, or one that is named does not.
#include <chrono>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "crt_runtime/error.hpp"
#include "crt_runtime/selftest.hpp"

namespace {

constexpr int kExitUnusable = 2;
constexpr int kExitMissing = 3;
constexpr int kExitBug = 70;

void print_replay(const crt::SelftestTarget& target, const crt::SelftestReplay& replay) {
  const crt::SelftestTensor* worst = nullptr;
  for (const crt::SelftestTensor& tensor : replay.tensors) {
    if (worst == nullptr || !(tensor.largest <= worst->largest)) {
      worst = &tensor;
    }
  }
  const char* result = replay.failures.empty() ? "passed" : "off";
  if (worst == nullptr) {
    std::printf("%s  %s  %s\n", target.target.c_str(), replay.replay.c_str(), result);
    return;
  }
  std::printf("%s  %s  largest error %.2g (%s %s), limit %g  %s\n", target.target.c_str(), replay.replay.c_str(),
              worst->largest, worst->tensor.c_str(), worst->where.c_str(), worst->limit, result);
}

int print_report(const crt::SelftestReport& report, double seconds) {
  int ran = 0;
  for (const crt::SelftestTarget& target : report.targets) {
    for (const crt::SelftestReplay& replay : target.replays) {
      print_replay(target, replay);
    }
    if (target.status == crt::SelftestStatus::not_run) {
      std::printf("not run here: %s: %s\n", target.target.c_str(), target.reason.c_str());
    } else {
      ++ran;
    }
  }
  for (const std::string& failure : report.failures()) {
    std::printf("off: %s\n", failure.c_str());
  }
  if (!report.validated) {
    std::printf("note: this bundle was never shown to agree with PyTorch on text; loaders refuse it\n");
  }
  const int code = report.exit_code();
  const char* incomplete = ran == 0 ? "NOT PASSED: no target runs here"
                                    : "NOT PASSED: nothing is off, but not everything ran";
  std::printf("self-test: %s (%d targets, %.1f s)\n", code == 0 ? "passed" : (code == 1 ? "FAILED" : incomplete), ran,
              seconds);
  return code;
}

int run(const std::vector<std::string>& arguments) {
  if (arguments.empty() || arguments.front() == "-h" || arguments.front() == "--help") {
    std::FILE* stream = arguments.empty() ? stderr : stdout;
    std::fprintf(stream,
                 "usage: crt-selftest BUNDLE [TARGET...]\n"
                 "Replay the vectors in BUNDLE, made by PyTorch FP32, on this machine; TARGETs must run.\n"
                 "Exit codes: 0 passed, 1 a target is off, 2 unusable bundle or arguments, 3 cannot run here.\n");
    return arguments.empty() ? kExitUnusable : 0;
  }
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::string> targets(arguments.begin() + 1, arguments.end());
  const crt::SelftestReport report = crt::run_selftest(arguments.front(), targets);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return print_report(report, elapsed.count());
}

}  // namespace

int main(int count, char** values) {
  try {
    return run({values + (count > 0 ? 1 : 0), values + count});
  } catch (const crt::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.kind() == crt::ErrorKind::missing_dependency ? kExitMissing : kExitUnusable;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: unexpected: %s\nThis is a bug in crt-selftest: please report it.\n", error.what());
    return kExitBug;
  }
}
