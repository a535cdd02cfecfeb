// The whole C++ API.
#pragma once

#include "crt_runtime/bundle.hpp"
#include "crt_runtime/config.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/generation.hpp"
#include "crt_runtime/prefill.hpp"
#include "crt_runtime/sampling.hpp"
#include "crt_runtime/selftest.hpp"
#include "crt_runtime/session.hpp"
#include "crt_runtime/snapshot.hpp"
#include "crt_runtime/terminal.hpp"
#include "crt_runtime/tokenizer.hpp"
