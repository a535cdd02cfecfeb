// What the opaque handles of crt.h are.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "c_api/c_call.hpp"
#include "crt_runtime/bundle.hpp"
#include "crt_runtime/crt.h"
#include "crt_runtime/generation.hpp"
#include "crt_runtime/session.hpp"
#include "crt_runtime/snapshot.hpp"
#include "crt_runtime/tokenizer.hpp"

struct crt_bundle {
  explicit crt_bundle(crt::Bundle opened) : bundle(std::move(opened)) {}

  crt::Bundle bundle;
};

struct crt_session {
  std::shared_ptr<crt::Session> session;
  bool slides;
};

struct crt_snapshot {
  crt::Snapshot snapshot;
};

struct crt_generation {
  std::shared_ptr<crt::Session> session;  // before the generation, which refers to it
  crt::Generation generation;
  std::string rest;  // of the last call that asked for it
};

struct crt_text_stream {
  crt::TextStream stream;
  std::string text;  // of the last call
};

namespace crt::c_api {

/// Give a handle to the caller.
template <class Handle>
void give(std::unique_ptr<Handle> made, Handle** handle) noexcept {
  *handle = made.release();
}

/// Take a handle back; it is freed with the returned pointer.
template <class Handle>
std::unique_ptr<Handle> take(Handle* handle) noexcept {
  return std::unique_ptr<Handle>(handle);
}

/// What the rows of a call on this session may be.
inline RowLimits row_limits(const crt_session& session) {
  const crt::Session& opened = *session.session;
  const auto capacity = session.slides ? std::nullopt : std::make_optional(opened.capacity());
  return {opened.batch(), opened.position(), capacity};
}

}  // namespace crt::c_api
