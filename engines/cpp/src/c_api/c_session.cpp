// crt.h: sessions and snapshots.
#include <utility>

#include "c_api/c_call.hpp"

using crt::c_api::call;
using crt::c_api::read;
using crt::c_api::require;

namespace {

crt_session_options default_session_options() noexcept {
  return {sizeof(crt_session_options), 1, 0, -1, CRT_ON_FULL_ERROR};
}

crt_prefill_options default_prefill_options() noexcept { return {sizeof(crt_prefill_options), 0, 0}; }

crt::SessionOptions session_options(const crt_session_options* options) {
  const auto taken = crt::c_api::taken_options(options, "crt_session_options", default_session_options());
  if (taken.on_full != CRT_ON_FULL_ERROR && taken.on_full != CRT_ON_FULL_EVICT) {
    throw crt::Error(crt::ErrorKind::input, "on_full must be CRT_ON_FULL_ERROR (0) or CRT_ON_FULL_EVICT (1), found " +
                                                std::to_string(taken.on_full));
  }
  crt::SessionOptions result;
  result.batch = taken.batch;
  if (taken.capacity != 0) result.capacity = taken.capacity;
  if (taken.threads != -1) result.threads = taken.threads;
  result.on_full = taken.on_full == CRT_ON_FULL_EVICT ? crt::OnFull::evict : crt::OnFull::error;
  return result;
}

void give_session(crt::Session session, bool slides, crt_session** handle) {
  auto shared = std::make_shared<crt::Session>(std::move(session));
  crt::c_api::give(std::make_unique<crt_session>(crt_session{std::move(shared), slides}), handle);
}

}  // namespace

extern "C" {

void crt_session_options_init(crt_session_options* options, size_t struct_size) {
  crt::c_api::init_options(options, struct_size, default_session_options());
}

void crt_prefill_options_init(crt_prefill_options* options, size_t struct_size) {
  crt::c_api::init_options(options, struct_size, default_prefill_options());
}

crt_status crt_session_open(crt_bundle* bundle, const char* target, const crt_session_options* options,
                            crt_session** session) {
  return call([&] {
    require({{bundle, "bundle"}, {session, "session"}});
    const crt::SessionOptions taken = session_options(options);
    const std::string name = target != nullptr ? target : bundle->bundle.default_target();
    give_session(bundle->bundle.session(name, taken), taken.on_full == crt::OnFull::evict, session);
  });
}

void crt_session_close(crt_session* session) { crt::c_api::take(session); }

crt_status crt_session_target(const crt_session* session, const char** target) {
  return read(session, "session", target, "target", [](auto& opened) { return opened.session->target().c_str(); });
}

crt_status crt_session_batch(const crt_session* session, int64_t* batch) {
  return read(session, "session", batch, "batch", [](auto& opened) { return opened.session->batch(); });
}

crt_status crt_session_capacity(const crt_session* session, int64_t* capacity) {
  return read(session, "session", capacity, "capacity", [](auto& opened) { return opened.session->capacity(); });
}

crt_status crt_session_vocab_size(const crt_session* session, int64_t* vocab) {
  return read(session, "session", vocab, "vocab", [](auto& opened) { return opened.session->vocab_size(); });
}

crt_status crt_session_position(const crt_session* session, const int64_t** position) {
  return read(session, "session", position, "position", [](auto& opened) { return opened.session->position(); });
}

crt_status crt_session_prefill(crt_session* session, const int64_t* ids, const int64_t* lengths, size_t rows,
                               const crt_prefill_options* options, const float** logits) {
  return call([&] {
    require({{session, "session"}});
    const auto taken = crt::c_api::taken_options(options, "crt_prefill_options", default_prefill_options());
    crt::PrefillOptions prefill;
    prefill.passes = taken.passes;
    prefill.chunk = taken.chunk;
    const auto given = crt::c_api::token_rows(ids, lengths, rows, crt::c_api::row_limits(*session));
    const float* found = session->session->prefill(given, prefill);
    if (logits != nullptr) *logits = found;
  });
}

crt_status crt_session_step(crt_session* session, const int64_t* tokens, size_t count, const float** logits) {
  return call([&] {
    require({{session, "session"}, {tokens, "tokens"}});
    const float* found = session->session->step(tokens, count);
    if (logits != nullptr) *logits = found;
  });
}

crt_status crt_session_advance(crt_session* session, const int64_t* tokens, size_t count) {
  return call([&] {
    require({{session, "session"}, {tokens, "tokens"}});
    session->session->advance(tokens, count);
  });
}

crt_status crt_session_logits(crt_session* session, const float** logits) {
  return read(session, "session", logits, "logits", [](auto& opened) { return opened.session->logits(); });
}

crt_status crt_session_next_tokens(crt_session* session, const int64_t** tokens) {
  return read(session, "session", tokens, "tokens", [](auto& opened) { return opened.session->next_tokens(); });
}

crt_status crt_session_reset(crt_session* session) {
  return call([&] {
    require({{session, "session"}});
    session->session->reset();
  });
}

crt_status crt_session_snapshot(crt_session* session, crt_snapshot** snapshot) {
  return call([&] {
    require({{session, "session"}, {snapshot, "snapshot"}});
    crt::c_api::give(std::make_unique<crt_snapshot>(crt_snapshot{session->session->snapshot()}), snapshot);
  });
}

crt_status crt_session_restore(crt_session* session, const crt_snapshot* snapshot) {
  return call([&] {
    require({{session, "session"}, {snapshot, "snapshot"}});
    session->session->restore(snapshot->snapshot);
  });
}

crt_status crt_session_fork(crt_session* session, crt_session** fork) {
  return call([&] {
    require({{session, "session"}, {fork, "fork"}});
    give_session(session->session->fork(), session->slides, fork);
  });
}

crt_status crt_snapshot_save(const crt_snapshot* snapshot, const char* path) {
  return call([&] {
    require({{snapshot, "snapshot"}, {path, "path"}});
    snapshot->snapshot.save(path);
  });
}

crt_status crt_snapshot_load(const char* path, crt_snapshot** snapshot) {
  return call([&] {
    require({{path, "path"}, {snapshot, "snapshot"}});
    crt::c_api::give(std::make_unique<crt_snapshot>(crt_snapshot{crt::Snapshot::load(path)}), snapshot);
  });
}

void crt_snapshot_free(crt_snapshot* snapshot) { crt::c_api::take(snapshot); }

}  // extern "C"
