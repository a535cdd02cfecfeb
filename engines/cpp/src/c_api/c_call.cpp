#include "c_api/c_call.hpp"

#include <cstdint>
#include <exception>
#include <new>

#include "session/rows.hpp"
#include "text/messages.hpp"

namespace crt::c_api {
namespace {

/// The message of this thread's last failing call: in text, or a literal where there was no memory for it.
struct LastError {
  std::string text;
  const char* message = "";
};
thread_local LastError last_error;

crt_status fail(crt_status status, const char* message) noexcept {
  try {
    last_error.text = message;
    last_error.message = last_error.text.c_str();
  } catch (...) {
    last_error.message = "out of memory";
  }
  return status;
}

crt_status status_from_kind(ErrorKind kind) noexcept {
  switch (kind) {
    case ErrorKind::input: return CRT_ERROR_INPUT;
    case ErrorKind::bundle: return CRT_ERROR_BUNDLE;
    case ErrorKind::contract: return CRT_ERROR_CONTRACT;
    case ErrorKind::unsupported: return CRT_ERROR_UNSUPPORTED;
    case ErrorKind::missing_dependency: return CRT_ERROR_MISSING_DEPENDENCY;
  }
  return CRT_ERROR_INTERNAL;
}

/// What is wrong with a row's length; "" if nothing is.
std::string length_problem(std::int64_t length) {
  // More elements than an array can have; the allocation that would find out must not be tried.
  constexpr std::int64_t kMost = PTRDIFF_MAX / static_cast<std::int64_t>(sizeof(std::int64_t));
  const std::string found = std::to_string(length);
  if (length < 0) return "length " + found + " must be at least 0";
  return length > kMost ? found + " tokens are more than memory can hold" : "";
}

/// lengths holds as many elements as the caller said; rows beyond the batch may lie behind its end.
void check_lengths(const std::int64_t* lengths, std::size_t rows, const RowLimits& limits) {
  if (rows != static_cast<std::size_t>(limits.batch)) {
    throw Error(ErrorKind::input, "expected one row of token ids per sequence: batch is " +
                                      std::to_string(limits.batch) + ", found " + std::to_string(rows) + " rows");
  }
  require({{lengths, "lengths"}});
  if (limits.capacity) {
    check_capacity({limits.positions, limits.positions + rows}, {lengths, lengths + rows}, *limits.capacity);
  }
  std::vector<std::string> problems;
  for (std::size_t row = 0; row < rows; ++row) {
    const std::string problem = length_problem(lengths[row]);
    if (!problem.empty()) problems.push_back("row " + std::to_string(row) + ": " + problem);
  }
  refuse_problems(ErrorKind::input, "lengths", problems);
}

}  // namespace

crt_status status_from_exception() noexcept {
  try {
    throw;
  } catch (const Error& error) {
    return fail(status_from_kind(error.kind()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(CRT_ERROR_INTERNAL, "out of memory");
  } catch (const std::exception& error) {
    return fail(CRT_ERROR_INTERNAL, error.what());
  } catch (...) {
    return fail(CRT_ERROR_INTERNAL, "an exception that is no std::exception");
  }
}

void require(std::initializer_list<Required> arguments) {
  std::vector<std::string> problems;
  for (const Required& argument : arguments) {
    if (argument.pointer == nullptr) problems.push_back(std::string(argument.name) + " must not be NULL");
  }
  refuse_problems(ErrorKind::input, "arguments", problems);
}

void check_struct_size(const char* type, std::size_t found, std::size_t oldest, std::size_t newest) {
  if (found >= oldest && found <= newest) return;
  const std::string name = type;
  throw Error(ErrorKind::input, name + ": struct_size is " + std::to_string(found) + ", this library (" +
                                    crt_version() + ") knows sizes from " + std::to_string(oldest) + " to " +
                                    std::to_string(newest) + "; call " + name +
                                    "_init(&options, sizeof options) first, and compile with this library's crt.h");
}

std::vector<std::vector<std::int64_t>> token_rows(const std::int64_t* ids, const std::int64_t* lengths,
                                                  std::size_t rows, const RowLimits& limits) {
  check_lengths(lengths, rows, limits);
  if (std::any_of(lengths, lengths + rows, [](std::int64_t length) { return length > 0; })) require({{ids, "ids"}});
  std::vector<std::vector<std::int64_t>> result;
  result.reserve(rows);
  for (std::size_t row = 0; row < rows; ++row) {
    const auto length = static_cast<std::size_t>(lengths[row]);
    if (length == 0) {
      result.emplace_back();
    } else {
      result.emplace_back(ids, ids + length);
      ids += length;
    }
  }
  return result;
}

}  // namespace crt::c_api

extern "C" {

const char* crt_version(void) { return CRT_RUNTIME_VERSION; }

const char* crt_last_error(void) { return crt::c_api::last_error.message; }

const char* crt_status_name(crt_status status) {
  switch (status) {
    case CRT_OK: return "ok";
    case CRT_ERROR_INPUT: return "input";
    case CRT_ERROR_BUNDLE: return "bundle";
    case CRT_ERROR_CONTRACT: return "contract";
    case CRT_ERROR_UNSUPPORTED: return "unsupported";
    case CRT_ERROR_MISSING_DEPENDENCY: return "missing_dependency";
    case CRT_ERROR_INTERNAL: return "internal";
  }
  return "unknown";
}

}  // extern "C"
