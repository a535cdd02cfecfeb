// crt-selftest BUNDLE [TARGET...]: does this machine compute what PyTorch computed when the bundle was built?
//
// Exit codes: 0 passed, 1 a target is off, 2 the bundle is unusable or has no vectors, or the command line is wrong,
// 3 no target runs here, or one that is named does not, or stdout is closed or full.
#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <string_view>
#include <vector>

#include "crt_runtime/error.hpp"
#include "crt_runtime/selftest.hpp"
#include "crt_runtime/terminal.hpp"

namespace {

constexpr int kExitUnusable = 2;
constexpr int kExitMissing = 3;
constexpr int kExitBug = 70;

/// A file descriptor that every byte gets to, or nobody is told that it did.
class Output {
 public:
  explicit Output(int descriptor) : descriptor_(descriptor), closed_(fcntl(descriptor, F_GETFD) == -1) {}

  /// Writes everything; a full pipe that does not block is waited for. Returns 0, or what errno says.
  int write(std::string_view text) const {
    if (closed_) return EBADF;
    while (!text.empty()) {
      const ssize_t count = ::write(descriptor_, text.data(), text.size());
      if (count >= 0) {
        text.remove_prefix(static_cast<std::size_t>(count));
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        pollfd slow{descriptor_, POLLOUT, 0};
        poll(&slow, 1, -1);
      } else if (errno != EINTR) {
        return errno;
      }
    }
    return 0;
  }

  /// Keeps the number of a closed descriptor from the next file that is opened.
  void occupy() const {
    if (closed_) {
      const int opened = open("/dev/null", O_RDWR);
      if (opened != -1 && opened != descriptor_) close(opened);
    }
  }

 private:
  int descriptor_;
  bool closed_;
};

/// Appends formatted text.
[[gnu::format(printf, 2, 3)]] void append(std::string& text, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  va_list again;
  va_copy(again, arguments);
  const int size = std::vsnprintf(nullptr, 0, format, arguments);
  va_end(arguments);
  if (size > 0) {
    const std::size_t before = text.size();
    text.resize(before + static_cast<std::size_t>(size) + 1);
    std::vsnprintf(&text[before], static_cast<std::size_t>(size) + 1, format, again);
    text.pop_back();
  }
  va_end(again);
}

void print_replay(std::string& text, const crt::SelftestTarget& target, const crt::SelftestReplay& replay) {
  const crt::SelftestTensor* worst = nullptr;
  for (const crt::SelftestTensor& tensor : replay.tensors) {
    if (worst == nullptr || !(tensor.largest <= worst->largest)) worst = &tensor;
  }
  const char* result = replay.failures.empty() ? "passed" : "off";
  if (worst == nullptr) {
    append(text, "%s  %s  %s\n", target.target.c_str(), replay.replay.c_str(), result);
    return;
  }
  append(text, "%s  %s  largest error %.2g (%s %s), limit %g  %s\n", target.target.c_str(), replay.replay.c_str(),
              worst->largest, worst->tensor.c_str(), worst->where.c_str(), worst->limit, result);
}

int print_report(std::string& text, const crt::SelftestReport& report, double seconds) {
  int ran = 0;
  for (const crt::SelftestTarget& target : report.targets) {
    for (const crt::SelftestReplay& replay : target.replays) print_replay(text, target, replay);
    if (target.status == crt::SelftestStatus::not_run) {
      append(text, "not run here: %s: %s\n", target.target.c_str(), target.reason.c_str());
    } else {
      ++ran;
    }
  }
  for (const std::string& failure : report.failures()) append(text, "off: %s\n", failure.c_str());
  if (!report.validated) {
    append(text, "note: this bundle was never shown to agree with PyTorch on text; loaders refuse it\n");
  }
  const int code = report.exit_code();
  const char* incomplete = ran == 0 ? "NOT PASSED: no target runs here"
                                    : "NOT PASSED: nothing is off, but not everything ran";
  append(text, "self-test: %s (%d targets, %.1f s)\n", code == 0 ? "passed" : (code == 1 ? "FAILED" : incomplete), ran,
              seconds);
  return code;
}

/// Runs what the command line asks for; fills what goes to stdout and returns the exit code.
int run(const std::vector<std::string>& arguments, std::string& text) {
  constexpr char kUsage[] =
      "usage: crt-selftest BUNDLE [TARGET...]\n"
      "Replay the vectors in BUNDLE, made by PyTorch FP32, on this machine; TARGETs must run.\n"
      "Exit codes: 0 passed, 1 a target is off, 2 unusable bundle or arguments, 3 cannot run here or cannot write.\n";
  if (arguments.empty()) {
    Output(STDERR_FILENO).write(kUsage);
    return kExitUnusable;
  }
  if (arguments.front() == "-h" || arguments.front() == "--help") {
    text = kUsage;
    return 0;
  }
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::string> targets(arguments.begin() + 1, arguments.end());
  const crt::SelftestReport report = crt::run_selftest(arguments.front(), targets);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return print_report(text, report, elapsed.count());
}

}  // namespace

int main(int count, char** values) {
  const Output input(STDIN_FILENO);
  const Output output(STDOUT_FILENO);
  const Output messages(STDERR_FILENO);
  for (const Output* stream : {&input, &output, &messages}) stream->occupy();
  try {
    std::string text;
    const int code = run({values + (count > 0 ? 1 : 0), values + count}, text);
    // Names of targets and tensors are the bundle's own.
    const int failure = output.write(crt::visible(text));
    if (failure != 0) {
      messages.write(std::string("error: stdout cannot be written to: ") + std::strerror(failure) + "\n");
      return kExitMissing;
    }
    return code;
  } catch (const crt::Error& error) {
    messages.write(std::string("error: ") + error.what() + "\n");
    return error.kind() == crt::ErrorKind::missing_dependency ? kExitMissing : kExitUnusable;
  } catch (const std::exception& error) {
    messages.write("error: unexpected: " + crt::visible(error.what()) +
                   "\nThis is a bug in crt-selftest: please report it.\n");
    return kExitBug;
  }
}
