// crt.h: bundles and text.
#include <algorithm>
#include <utility>

#include "c_api/c_call.hpp"

using crt::c_api::call;
using crt::c_api::read;
using crt::c_api::require;

namespace {

crt_bundle_options default_bundle_options() noexcept { return {sizeof(crt_bundle_options), 0, nullptr}; }

crt_model_config config_from_model(const crt::ModelConfig& model) noexcept {
  crt_model_config config{};
  config.struct_size = sizeof config;
  config.vocab = model.vocab;
  config.hidden = model.hidden;
  config.max_position_embeddings = model.max_position_embeddings;
  config.sliding_window = model.window().value_or(0);
  config.bos_token_id = model.bos_token_id.value_or(CRT_NO_TOKEN);
  config.eos_token_ids = model.eos_token_ids.data();
  config.eos_token_count = model.eos_token_ids.size();
  config.passes = model.passes;
  config.iterated = model.iterated ? 1 : 0;
  config.tokenizer = model.tokenizer.c_str();
  return config;
}

/// What a bundle has of a kind at an index; throws Error(input) if there is no such one.
template <typename Element>
const Element& element_at(const std::vector<Element>& elements, std::size_t index, const char* kind) {
  if (index < elements.size()) return elements[index];
  throw crt::Error(crt::ErrorKind::input, std::string(kind) + " " + std::to_string(index) +
                                              " does not exist: this bundle has " + std::to_string(elements.size()) +
                                              ", counted from 0");
}

/// The result of a stream's call, kept in the stream.
void give_text(crt_text_stream& stream, std::string found, const char** text, std::size_t* text_bytes) noexcept {
  stream.text = std::move(found);
  *text = stream.text.c_str();
  *text_bytes = stream.text.size();
}

[[noreturn]] void refuse_capacity(const char* what, std::size_t needed, std::size_t capacity) {
  throw crt::Error(crt::ErrorKind::input, std::string(what) + " needs room for " + std::to_string(needed) +
                                              " elements, capacity is " + std::to_string(capacity));
}

}  // namespace

extern "C" {

void crt_bundle_options_init(crt_bundle_options* options, size_t struct_size) {
  crt::c_api::init_options(options, struct_size, default_bundle_options());
}

void crt_model_config_init(crt_model_config* config, size_t struct_size) {
  crt_model_config empty{};
  empty.tokenizer = "";
  crt::c_api::init_options(config, struct_size, empty);
}

crt_status crt_bundle_open(const char* path, const crt_bundle_options* options, crt_bundle** bundle) {
  return call([&] {
    require({{path, "path"}, {bundle, "bundle"}});
    const auto taken = crt::c_api::taken_options(options, "crt_bundle_options", default_bundle_options());
    if (taken.identity != nullptr && *taken.identity == '\0') {  // a setting that was lost, say; in C++ it means any
      throw crt::Error(crt::ErrorKind::bundle,
                       "expected an identity, 64 hex digits as 'crt-export inspect' prints them, or NULL; found \"\"");
    }
    const char* identity = taken.identity == nullptr ? "" : taken.identity;
    crt::Bundle opened = crt::Bundle::load(path, taken.allow_unvalidated != 0, identity);
    crt::c_api::give(std::make_unique<crt_bundle>(std::move(opened)), bundle);
  });
}

void crt_bundle_close(crt_bundle* bundle) { crt::c_api::take(bundle); }

crt_status crt_bundle_identity(const crt_bundle* bundle, const char** identity) {
  return read(bundle, "bundle", identity, "identity", [](auto& opened) { return opened.bundle.identity().c_str(); });
}

crt_status crt_bundle_target_count(const crt_bundle* bundle, size_t* count) {
  return read(bundle, "bundle", count, "count", [](auto& opened) { return opened.bundle.targets().size(); });
}

crt_status crt_bundle_target(const crt_bundle* bundle, size_t index, const char** name) {
  return call([&] {
    require({{bundle, "bundle"}, {name, "name"}});
    *name = element_at(bundle->bundle.targets(), index, "target").c_str();
  });
}

crt_status crt_bundle_default_target(const crt_bundle* bundle, const char** name) {
  return call([&] {
    require({{bundle, "bundle"}, {name, "name"}});
    const auto& targets = bundle->bundle.targets();
    // The bundle's own string, which lives as long as the handle.
    *name = std::find(targets.begin(), targets.end(), bundle->bundle.default_target())->c_str();
  });
}

crt_status crt_bundle_config(const crt_bundle* bundle, crt_model_config* config) {
  return call([&] {
    require({{bundle, "bundle"}, {config, "config"}});
    const size_t size = config->struct_size;
    crt::c_api::check_struct_size("crt_model_config", size, sizeof *config, sizeof *config);
    crt_model_config found = config_from_model(bundle->bundle.config());
    found.struct_size = size;
    std::memcpy(config, &found, size);
  });
}

crt_status crt_state_count(const crt_bundle* bundle, size_t* count) {
  return read(bundle, "bundle", count, "count", [](auto& opened) { return opened.bundle.config().states.size(); });
}

crt_status crt_state_name(const crt_bundle* bundle, size_t index, const char** name) {
  return call([&] {
    require({{bundle, "bundle"}, {name, "name"}});
    *name = element_at(bundle->bundle.config().states, index, "state").name.c_str();
  });
}

crt_status crt_state_shape(const crt_bundle* bundle, size_t index, const int64_t** shape, size_t* dims) {
  return call([&] {
    require({{bundle, "bundle"}, {shape, "shape"}, {dims, "dims"}});
    const auto& found = element_at(bundle->bundle.config().states, index, "state").shape;
    *shape = found.data();
    *dims = found.size();
  });
}

crt_status crt_encode(const crt_bundle* bundle, const char* text, size_t text_bytes, int32_t prompt, int64_t* ids,
                      size_t capacity, size_t* count) {
  return call([&] {
    require({{bundle, "bundle"}, {text, "text"}, {count, "count"}});
    const crt::ByteTokenizer tokenizer = bundle->bundle.tokenizer();
    const std::string given(text, text_bytes);
    const auto found = prompt != 0 ? tokenizer.encode_prompt(given) : tokenizer.encode(given);
    *count = found.size();
    if (ids == nullptr) return;
    if (found.size() > capacity) refuse_capacity("ids", found.size(), capacity);
    std::copy(found.begin(), found.end(), ids);
  });
}

crt_status crt_decode(const crt_bundle* bundle, const int64_t* ids, size_t count, char* text, size_t capacity,
                      size_t* text_bytes) {
  return call([&] {
    require({{bundle, "bundle"}, {text_bytes, "text_bytes"}});
    if (count > 0) require({{ids, "ids"}});
    std::vector<std::int64_t> given;
    if (count > 0) given.assign(ids, ids + count);
    const std::string found = bundle->bundle.tokenizer().decode(given);
    *text_bytes = found.size();
    if (text == nullptr) return;
    if (found.size() >= capacity) refuse_capacity("text with its final NUL", found.size() + 1, capacity);
    std::memcpy(text, found.c_str(), found.size() + 1);
  });
}

crt_status crt_text_stream_new(const crt_bundle* bundle, crt_text_stream** stream) {
  return call([&] {
    require({{bundle, "bundle"}, {stream, "stream"}});
    crt::TextStream decoder = bundle->bundle.tokenizer().stream();
    crt::c_api::give(std::make_unique<crt_text_stream>(crt_text_stream{std::move(decoder), {}}), stream);
  });
}

crt_status crt_text_stream_push(crt_text_stream* stream, int64_t token, const char** text, size_t* text_bytes) {
  return call([&] {
    require({{stream, "stream"}, {text, "text"}, {text_bytes, "text_bytes"}});
    give_text(*stream, stream->stream.push(token), text, text_bytes);
  });
}

crt_status crt_text_stream_finish(crt_text_stream* stream, const char** text, size_t* text_bytes) {
  return call([&] {
    require({{stream, "stream"}, {text, "text"}, {text_bytes, "text_bytes"}});
    give_text(*stream, stream->stream.finish(), text, text_bytes);
  });
}

void crt_text_stream_free(crt_text_stream* stream) { crt::c_api::take(stream); }

}  // extern "C"
