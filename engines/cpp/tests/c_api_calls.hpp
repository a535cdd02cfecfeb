// What the tests of the C API share.
#pragma once

#include <cstddef>
#include <cstring>
#include <string>

#include "crt_runtime/crt.h"

namespace crt_test {

/// An options struct whose memory held something else before its init.
template <class Options>
Options initialised(void (*init)(Options*, std::size_t)) {
  Options options;
  std::memset(&options, 0xFF, sizeof options);
  init(&options, sizeof options);
  return options;
}

/// Whether the message of the last error contains this.
inline bool error_names(const char* text) { return std::string(crt_last_error()).find(text) != std::string::npos; }

/// Options under which tokens are drawn at random.
inline crt_sampling_options warm() {
  auto sampling = initialised(crt_sampling_options_init);
  sampling.temperature = 1.2;
  sampling.repetition_penalty = 1.1;
  sampling.seed = 5;
  return sampling;
}

}  // namespace crt_test
