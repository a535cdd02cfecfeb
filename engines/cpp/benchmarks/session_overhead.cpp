// What a session costs on top of the bare run of its step graph: session_overhead BUNDLE TARGET [THREADS].
//
// Prints one JSON object, microseconds per token. Bare runs, step(), advance() and a greedy generation take turns in
// one process, so that a machine that gets slower gets slower for all of them; the figures are medians over the turns.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "crt_runtime/bundle.hpp"
#include "engine/back_ends.hpp"
#include "session/tensors.hpp"

namespace {

constexpr int kTokens = 200;
constexpr int kTurns = 25;
constexpr std::int64_t kCapacity = 256;

double microseconds_per_token(const std::function<void()>& loop) {
  const auto begin = std::chrono::steady_clock::now();
  loop();
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count() / kTokens;
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + kTurns / 2, values.end());
  return values[kTurns / 2];
}

void measure(const char* path, const char* target_name, int threads) {
  crt::BundleFiles files = crt::BundleFiles::open(path, true);
  const crt::Target& target = files.target(target_name);
  const auto engine = crt::open_engine(files, target, threads);
  crt::SessionTensors tensors(*engine, {1, kCapacity, files.config(), target.cache_dtype});
  crt::Launch& launch = tensors.step_launch(crt::Batch{0, 1, 1});

  crt::Bundle bundle = crt::Bundle::load(path, true);
  crt::SessionOptions session_options;
  session_options.threads = threads;
  session_options.capacity = kCapacity;
  crt::Session session = bundle.session(target_name, session_options);
  crt::GenerationOptions options;
  options.max_new_tokens = kTokens;
  options.ignore_eos = true;

  std::vector<double> bare, step, advance, generate;
  for (int turn = 0; turn < kTurns; ++turn) {
    bare.push_back(microseconds_per_token([&] {
      for (int index = 0; index < kTokens; ++index) launch.run();
    }));
    std::int64_t token = 0;
    session.reset();
    session.prefill({{1}});
    step.push_back(microseconds_per_token([&] {
      for (int index = 0; index < kTokens; ++index) session.step(&token, 1);
    }));
    session.reset();
    session.prefill({{1}});
    advance.push_back(microseconds_per_token([&] {
      for (int index = 0; index < kTokens; ++index) session.advance(session.next_tokens(), 1);
    }));
    session.reset();
    crt::Generation generation = session.generate({{1}}, options);
    generation.next(&token);
    generate.push_back(microseconds_per_token([&] {
      while (generation.next(&token)) {
      }
    }));
  }
  std::printf("{\"bare\": %.2f, \"step\": %.2f, \"advance\": %.2f, \"generate\": %.2f}\n", median(bare), median(step),
              median(advance), median(generate));
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 3) {
    std::fprintf(stderr, "usage: session_overhead BUNDLE TARGET [THREADS]\n");
    return 2;
  }
  try {
    measure(arguments[1], arguments[2], count > 3 ? std::atoi(arguments[3]) : 1);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
