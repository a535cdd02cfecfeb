// crt.h: generation and sampling.
#include <new>
#include <stdexcept>
#include <utility>

#include "c_api/c_call.hpp"
#include "crt_runtime/sampling.hpp"

using crt::c_api::call;
using crt::c_api::require;

namespace {

crt_sampling_options default_sampling_options() noexcept {
  const crt::SamplingOptions defaults;
  crt_sampling_options options{};
  options.struct_size = sizeof options;
  options.temperature = defaults.temperature;
  options.top_p = defaults.top_p;
  options.min_p = defaults.min_p;
  options.repetition_penalty = defaults.repetition_penalty;
  options.top_k = defaults.top_k;
  options.seed = defaults.seed;
  return options;
}

crt_generation_options default_generation_options() noexcept {
  crt_generation_options options{};
  options.struct_size = sizeof options;
  options.max_new_tokens = 64;
  return options;
}

crt::SamplingOptions sampling_options(const crt_sampling_options* options) {
  const auto taken = crt::c_api::taken_options(options, "crt_sampling_options", default_sampling_options());
  crt::SamplingOptions result;
  result.temperature = taken.temperature;
  result.top_k = taken.top_k;
  result.top_p = taken.top_p;
  result.min_p = taken.min_p;
  result.repetition_penalty = taken.repetition_penalty;
  result.seed = taken.seed;
  return result;
}

crt::GenerationOptions generation_options(const crt_generation_options& taken) {
  crt::GenerationOptions result;
  result.max_new_tokens = taken.max_new_tokens;
  result.passes = taken.passes;
  result.ignore_eos = taken.ignore_eos != 0;
  result.sampling = sampling_options(taken.sampling);
  if (taken.stop_token_count > 0) {
    require({{taken.stop_tokens, "stop_tokens"}});
    result.stop_tokens.assign(taken.stop_tokens, taken.stop_tokens + taken.stop_token_count);
  }
  if (taken.stop_string_count > 0) require({{taken.stop_strings, "stop_strings"}});
  for (size_t index = 0; index < taken.stop_string_count; ++index) {
    require({{taken.stop_strings[index], "every string of stop_strings"}});
    result.stop_strings.emplace_back(taken.stop_strings[index]);
  }
  return result;
}

crt::TokenCallback token_callback(crt_token_callback callback, void* user) {
  if (callback == nullptr) return nullptr;
  return [callback, user](std::int64_t row, std::int64_t token, const std::string& piece) {
    return callback(user, row, token, piece.c_str(), piece.size()) != 0;
  };
}

crt::Sampler sampler_of(std::size_t vocab) {
  const auto too_large = [vocab] {
    return crt::Error(crt::ErrorKind::input, "vocab " + std::to_string(vocab) + " needs more memory than there is");
  };
  try {
    return crt::Sampler(vocab);
  } catch (const std::bad_alloc&) {
    throw too_large();
  } catch (const std::length_error&) {  // a vector's word for far too much
    throw too_large();
  }
}

void give_text(const std::string& found, const char** text, std::size_t* text_bytes) noexcept {
  *text = found.c_str();
  *text_bytes = found.size();
}

}  // namespace

extern "C" {

void crt_sampling_options_init(crt_sampling_options* options, size_t struct_size) {
  crt::c_api::init_options(options, struct_size, default_sampling_options());
}

void crt_generation_options_init(crt_generation_options* options, size_t struct_size) {
  crt::c_api::init_options(options, struct_size, default_generation_options());
}

crt_status crt_session_generate(crt_session* session, const int64_t* ids, const int64_t* lengths, size_t rows,
                                const crt_generation_options* options, crt_generation** generation) {
  return call([&] {
    require({{session, "session"}, {generation, "generation"}});
    const auto taken = crt::c_api::taken_options(options, "crt_generation_options", default_generation_options());
    std::vector<std::vector<std::int64_t>> prompts;
    if (rows > 0) prompts = crt::c_api::token_rows(ids, lengths, rows, crt::c_api::row_limits(*session));
    auto made = session->session->generate(std::move(prompts), generation_options(taken),
                                           token_callback(taken.callback, taken.user));
    auto handle = std::make_unique<crt_generation>(crt_generation{session->session, std::move(made), {}});
    crt::c_api::give(std::move(handle), generation);
  });
}

crt_status crt_generation_next(crt_generation* generation, int64_t* tokens, size_t count, int32_t* more) {
  return call([&] {
    require({{generation, "generation"}, {tokens, "tokens"}, {more, "more"}});
    const auto batch = static_cast<size_t>(generation->session->batch());
    if (count != batch) {
      throw crt::Error(crt::ErrorKind::input, "tokens needs one element per row: batch is " + std::to_string(batch) +
                                                  ", count is " + std::to_string(count));
    }
    *more = generation->generation.next(tokens) ? 1 : 0;
  });
}

crt_status crt_generation_tokens(const crt_generation* generation, size_t row, const int64_t** tokens, size_t* count) {
  return call([&] {
    require({{generation, "generation"}, {tokens, "tokens"}, {count, "count"}});
    const auto& found = generation->generation.tokens(row);
    *tokens = found.data();
    *count = found.size();
  });
}

crt_status crt_generation_text(const crt_generation* generation, size_t row, const char** text, size_t* text_bytes) {
  return call([&] {
    require({{generation, "generation"}, {text, "text"}, {text_bytes, "text_bytes"}});
    give_text(generation->generation.text(row), text, text_bytes);
  });
}

crt_status crt_generation_piece(const crt_generation* generation, size_t row, const char** text, size_t* text_bytes) {
  return call([&] {
    require({{generation, "generation"}, {text, "text"}, {text_bytes, "text_bytes"}});
    give_text(generation->generation.piece(row), text, text_bytes);
  });
}

crt_status crt_generation_rest(crt_generation* generation, size_t row, const char** text, size_t* text_bytes) {
  return call([&] {
    require({{generation, "generation"}, {text, "text"}, {text_bytes, "text_bytes"}});
    generation->rest = generation->generation.rest(row);
    give_text(generation->rest, text, text_bytes);
  });
}

crt_status crt_generation_stop_reason(const crt_generation* generation, size_t row, crt_stop_reason* reason) {
  return call([&] {
    require({{generation, "generation"}, {reason, "reason"}});
    switch (generation->generation.stop_reason(row)) {
      case crt::StopReason::running: *reason = CRT_STOP_RUNNING; break;
      case crt::StopReason::max_new_tokens: *reason = CRT_STOP_MAX_NEW_TOKENS; break;
      case crt::StopReason::stop_token: *reason = CRT_STOP_TOKEN; break;
      case crt::StopReason::stop_string: *reason = CRT_STOP_STRING; break;
      case crt::StopReason::callback: *reason = CRT_STOP_CALLBACK; break;
    }
  });
}

const char* crt_stop_reason_name(crt_stop_reason reason) {
  switch (reason) {
    case CRT_STOP_RUNNING: return crt::stop_reason_name(crt::StopReason::running);
    case CRT_STOP_MAX_NEW_TOKENS: return crt::stop_reason_name(crt::StopReason::max_new_tokens);
    case CRT_STOP_TOKEN: return crt::stop_reason_name(crt::StopReason::stop_token);
    case CRT_STOP_STRING: return crt::stop_reason_name(crt::StopReason::stop_string);
    case CRT_STOP_CALLBACK: return crt::stop_reason_name(crt::StopReason::callback);
  }
  return "unknown";
}

void crt_generation_free(crt_generation* generation) { crt::c_api::take(generation); }

crt_status crt_sample_token(const float* logits, const uint8_t* seen, size_t vocab,
                            const crt_sampling_options* options, uint32_t row, uint64_t step, int64_t* token) {
  return call([&] {
    require({{logits, "logits"}, {token, "token"}});
    const crt::SamplingOptions taken = sampling_options(options);
    taken.check();
    *token = sampler_of(vocab).sample(logits, seen, taken, row, step);
  });
}

}  // extern "C"
