// Times steps of one row on demand: bench_step BUNDLE TARGET [THREADS].
//
// Opens a session, then answers every line "POSITION COUNT" of its input with one JSON list: the milliseconds of each of
// COUNT steps from POSITION tokens on, after as many warm-up steps as bring the session there. Run by
// validate/benchmarks/step_by_language.py, which gives turns to this program and to the same loop in Python.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <vector>

#include "crt_runtime/bundle.hpp"

namespace {

using Clock = std::chrono::steady_clock;

/// Some id of the vocabulary, another one at every position.
std::int64_t token_at(std::int64_t position, std::int64_t vocab) { return (7 * position + 1) % vocab; }

void step_to(crt::Session& session, std::int64_t position) {
  while (*session.position() < position) {
    session.step({token_at(*session.position(), session.vocab_size())});
  }
}

void answer(crt::Session& session, std::int64_t position, std::int64_t count) {
  if (*session.position() > position) {
    session.reset();
  }
  step_to(session, position);
  std::vector<double> times;
  for (std::int64_t index = 0; index < count; ++index) {
    const std::int64_t token = token_at(position + index, session.vocab_size());
    const auto begin = Clock::now();
    session.step(&token, 1);
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - begin).count());
  }
  std::printf("[");
  for (std::size_t index = 0; index < times.size(); ++index) {
    std::printf("%s%.4f", index == 0 ? "" : ", ", times[index]);
  }
  std::printf("]\n");
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: bench_step BUNDLE TARGET [THREADS]\n");
    return 2;
  }
  try {
    crt::Bundle bundle = crt::Bundle::load(arguments[1], true);
    crt::SessionOptions options;
    options.threads = count > 3 ? std::atoi(arguments[3]) : 0;
    crt::Session session = bundle.session(arguments[2], options);
    std::int64_t position = 0, steps = 0;
    while (std::cin >> position >> steps) {
      answer(session, position, steps);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
