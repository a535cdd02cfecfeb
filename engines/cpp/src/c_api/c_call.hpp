// What every function of the C API does around its work: refuse NULL, turn exceptions into a status and a message,
// read option structs of other versions; and what its opaque handles are.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "crt_runtime/bundle.hpp"
#include "crt_runtime/crt.h"
#include "crt_runtime/error.hpp"
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

/// Keep the message of the exception that is being handled for crt_last_error(); the status that goes with it.
crt_status status_from_exception() noexcept;

/// Run the body of an API function; no exception leaves.
template <class Body>
crt_status call(const Body& body) noexcept {
  try {
    body();
    return CRT_OK;
  } catch (...) {
    return status_from_exception();
  }
}

/// A pointer that must not be NULL, under the name that the header gives it.
struct Required {
  const void* pointer;
  const char* name;
};
/// Throws Error(input) naming every NULL.
void require(std::initializer_list<Required> arguments);

/// What a handle says about itself, into the caller's variable.
template <class Handle, class Value, class Get>
crt_status read(Handle* handle, const char* handle_name, Value* value, const char* value_name,
                const Get& get) noexcept {
  return call([&] {
    require({{handle, handle_name}, {value, value_name}});
    *value = get(*handle);
  });
}

/// Defaults into the caller's struct, as much as its size takes. What a newer header knows and this library does not is
/// zeroed; taken_options() refuses such a struct.
template <class Options>
void init_options(Options* options, std::size_t size, const Options& defaults) noexcept {
  if (options == nullptr || size < sizeof(std::size_t)) return;
  std::memset(options, 0, size);
  std::memcpy(options, &defaults, std::min(size, sizeof(Options)));
  options->struct_size = size;
}

/// Throws Error(input) for a struct that was not initialised, or whose header is newer than this library.
void check_struct_size(const char* type, std::size_t found, std::size_t oldest, std::size_t newest);

/// The caller's options over the defaults. Fields behind the caller's struct_size, which its header did not know, keep
/// theirs. oldest: size of the struct in the first version of the header.
template <class Options>
Options taken_options(const Options* options, const char* type, const Options& defaults,
                      std::size_t oldest = sizeof(Options)) {
  Options taken = defaults;
  if (options == nullptr) return taken;
  check_struct_size(type, options->struct_size, oldest, sizeof(Options));
  std::memcpy(&taken, options, options->struct_size);
  return taken;
}

/// How many rows a call takes, and how many tokens a row can take at all.
struct RowLimits {
  std::int64_t batch = 0;
  const std::int64_t* positions = nullptr;  ///< tokens in the cache of each row, int64 [batch]
  std::optional<std::int64_t> capacity;     ///< none where rows slide
};

/// Rows from flat ids and lengths. Throws Error(input) before it reads a length if there are not batch rows, and before
/// it reads an id if a length is negative or beyond the limits; lists every such length.
std::vector<std::vector<std::int64_t>> token_rows(const std::int64_t* ids, const std::int64_t* lengths,
                                                  std::size_t rows, const RowLimits& limits);

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
