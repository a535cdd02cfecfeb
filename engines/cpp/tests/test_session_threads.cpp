// Sessions in threads: one thread at a time each, any number of sessions at once.
#include <doctest/doctest.h>

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>
#include <utility>

#include "allocation_count.hpp"
#include "crt_runtime/session.hpp"
#include "given_bundle.hpp"
#include "session/session_impl.hpp"

using crt_test::row_of;
using crt_test::some_tokens;

TEST_CASE("threads: whoever calls while another call runs is refused, and the running call is not disturbed") {
  std::atomic_flag busy = ATOMIC_FLAG_INIT;
  {
    const crt::Exclusive held(busy);
    std::string text;
    std::thread([&] {
      text = crt_test::error_text(crt::ErrorKind::input, [&] { const crt::Exclusive other(busy); });
    }).join();
    CHECK(crt_test::contains(text, "busy with a call of another thread"));
    CHECK(crt_test::error_text(crt::ErrorKind::input, [&] { const crt::Exclusive again(busy); }) == text);
  }
  CHECK(crt_test::error_text(crt::ErrorKind::input, [&] { const crt::Exclusive free(busy); }).empty());
}

TEST_CASE("threads: sessions of one bundle in four threads give what each gives alone") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  const auto run = [](crt::Session& session, std::uint64_t seed) {
    session.prefill({some_tokens(3 + seed, seed)});
    for (const std::int64_t token : some_tokens(10, seed + 9)) {
      session.step({token});
    }
    return row_of(session.logits(), 0, session.vocab_size());
  };
  std::vector<std::vector<float>> together(4);
  std::vector<std::thread> threads;
  for (std::uint64_t seed = 0; seed < together.size(); ++seed) {
    threads.emplace_back([&, seed] {
      crt::Session session = bundle.session("ort-cpu-fp32");
      together[seed] = run(session, seed);
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  for (std::uint64_t seed = 0; seed < together.size(); ++seed) {
    crt::Session session = bundle.session("ort-cpu-fp32");
    CHECK(run(session, seed) == together[seed]);
  }
}

TEST_CASE("fork: a child ends with a session of its parent, and is told that its threads are not there") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_BUNDLE");
  crt::SessionOptions options;
  options.threads = 2;
  auto session = std::make_unique<crt::Session>(bundle.session("ort-cpu-fp32", options));
  session->prefill({some_tokens(3)});
  std::this_thread::sleep_for(std::chrono::milliseconds(300));  // until the session's threads sleep
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang is a death
    const std::string text = crt_test::error_text(crt::ErrorKind::unsupported, [&] { session->step({65}); });
    session.reset();
    { const crt::Bundle closed = std::move(bundle); }
    _exit(crt_test::contains(text, "before this process was forked") ? 0 : 5);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child);
  CHECK(status == 0);
  session->step({65});  // the parent goes on
  CHECK(session->position()[0] == 4);
}


TEST_CASE("session: one whose call failed is closed even where no memory is left to say why") {
  crt::Failure failure;
  const auto text = [&] { return crt_test::error_text(crt::ErrorKind::input, [&] { failure.require_none(); }); };
  failure.keep("the engine stopped\nwith details");
  CHECK(text() ==
        "an earlier call of this session failed (the engine stopped); call reset() or restore() before going on");
  failure.lift();
  CHECK(text() == "");
  const std::string reason(10000, 'x');
  crt_test::exhaust_memory(true);
  failure.keep(reason.c_str());
  crt_test::exhaust_memory(false);
  CHECK(crt_test::contains(text(), "failed (there was no memory to keep its message); call reset()"));
}
