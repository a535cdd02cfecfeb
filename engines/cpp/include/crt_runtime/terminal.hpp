// Text that may have been written by anybody, made fit for a terminal.
#pragma once

#include <string>
#include <string_view>

#include "crt_runtime/export.h"

namespace crt CRT_RUNTIME_API {

/// The UTF-8 text with every control character but newline and tab, every change of the reading direction and every
/// byte that is no UTF-8 as an escape: "\x1b", "\u202e". What an Error says has been through it; what a model says and
/// names from a bundle have not.
std::string visible(std::string_view text);

}  // namespace crt
