// What a session consists of: session.cpp runs the model, session_snapshot.cpp takes everything out and puts it back.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "crt_runtime/session.hpp"
#include "session/decoder.hpp"
#include "session/history.hpp"

namespace crt {

/// Holds a session for one call; throws Error(input) if another thread's call holds it.
class Exclusive {
 public:
  explicit Exclusive(std::atomic_flag& busy);
  ~Exclusive() { busy_.clear(std::memory_order_release); }
  Exclusive(const Exclusive&) = delete;
  Exclusive& operator=(const Exclusive&) = delete;

 private:
  std::atomic_flag& busy_;
};

/// Closes a session after a call that failed.
class Failure {
 public:
  /// What the call said, as far as there is memory for it; the session is closed in any case.
  void keep(const char* reason) noexcept;
  void lift() noexcept { happened_ = false; }
  /// Throws Error(input) if a call failed and nothing has lifted it.
  void require_none() const;

 private:
  bool happened_ = false;
  std::string reason_;
};

/// Its methods expect that their caller holds busy.
class Session::Impl {
 public:
  Impl(std::shared_ptr<Engine> engine, SessionSetup opened);

  /// Throws Error(input) if an earlier call failed.
  void require_usable() const;
  /// Poison the session: its history went on where what draws from it did not.
  void fail(const char* reason) noexcept { failure_.keep(reason); }
  const float* logits();
  void prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillOptions& options);
  void step(const std::int64_t* tokens, std::size_t count, bool check_logits);
  void reset();
  Snapshot snapshot();
  void restore(const Snapshot& snapshot);
  std::unique_ptr<Impl> fork();

  const SessionSetup setup;
  Decoder decoder;
  History history;
  mutable std::atomic_flag busy = ATOMIC_FLAG_INIT;

 private:
  void set_step(const std::int64_t* tokens, std::size_t count);
  template <typename Call>
  void poisoning(const Call& call);

  Failure failure_;
  // Scratch of one call, kept so that a step allocates nothing of its own.
  std::vector<std::int64_t> before_;
  std::vector<std::int64_t> lengths_;
  std::vector<std::int64_t> ids_;
};

/// Run what changes tensors; if it fails, poison the session and clear what it left.
template <typename Call>
void Session::Impl::poisoning(const Call& call) {
  before_ = decoder.position();
  try {
    call();
  } catch (const std::exception& error) {
    failure_.keep(error.what());
    decoder.abandon(before_);
    throw;
  } catch (...) {  // a thread that is cancelled unwinds with an exception of no class
    failure_.keep("it was interrupted");
    decoder.abandon(before_);
    throw;
  }
}

}  // namespace crt
