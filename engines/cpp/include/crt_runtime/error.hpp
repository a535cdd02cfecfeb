// Errors of the C++ runtime: one exception type with the kinds of the Python package's tree.
#pragma once

#include <stdexcept>
#include <string>

#include "crt_runtime/export.h"
#include "crt_runtime/terminal.hpp"

namespace crt CRT_RUNTIME_API {

/// What went wrong, in the terms of crt_export.errors; the comments name the Python class.
enum class ErrorKind {
  input,               ///< InputError: a call's argument; nothing has changed
  bundle,              ///< BundleError: a bundle or snapshot is missing, damaged, hostile or foreign
  contract,            ///< ContractError: a graph breaks the contract, or an engine failed or gave non-finite values
  unsupported,         ///< UnsupportedError: this library or model cannot do it
  missing_dependency,  ///< MissingDependencyError: a back end, driver or device is absent
};

/// Says what was expected, what was found, where, and how to fix it; control characters are escaped, see visible().
class Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message) : std::runtime_error(visible(message)), kind_(kind) {}
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace crt
