#include "parsers.hpp"

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>

#include "bundle/bundle_files.hpp"
#include "bundle/external_data.hpp"
#include "bundle/json.hpp"
#include "bundle/target.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/snapshot.hpp"
#include "crt_runtime/tokenizer.hpp"
#include "generation/row_text.hpp"
#include "selftest/vectors.hpp"
#include "tensorrt/tensorrt_sidecar.hpp"
#include "text/utf8.hpp"

namespace crt_fuzz {
namespace {

namespace fs = std::filesystem;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

std::string content_of(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

/// Throws Error(bundle), as a bundle does, where there is no such file.
crt::HeldFile held_file(const std::string& path) {
  try {
    const auto file = std::make_shared<const crt::RegularFile>(path);
    return {path, file, file->state(), std::string(64, '0')};
  } catch (const crt::SystemError& error) {
    throw crt::Error(crt::ErrorKind::bundle, path + ": " + error.what());
  }
}

/// As a bundle's manifest: schema, model, every target, every contract, and the files, which are not there.
void parse_manifest(const std::string& path) {
  const fs::path folder = fs::path(path + ".bundle");
  fs::create_directories(folder);
  fs::copy_file(path, folder / "manifest.json", fs::copy_options::overwrite_existing);
  crt::BundleFiles files = crt::BundleFiles::open(folder.string(), true);
  for (const std::string& name : files.target_names()) {
    try {
      const crt::Target& target = files.target(name);
      require(target.capacity >= 1, "a target has a capacity");
      for (const auto& [graph, file] : target.graphs) files.graph(file);
    } catch (const crt::Error&) {
      // Refused for itself; the next one may do.
    }
  }
}

/// As a snapshot and as the vectors of a tiny model.
void parse_safetensors(const std::string& path) {
  crt::ModelConfig config;
  config.vocab = 256;
  config.hidden = 16;
  config.max_position_embeddings = 256;
  config.states = {{"hidden", {16}}};
  config.caches = {{"0", 2, 8, {}, {}}};
  try {
    const crt::HeldFile file = held_file(path);
    const auto vectors = crt::SelftestVectors::load(file, config, std::string(64, '0'));
    require(vectors.has_run(crt::kRecurrence), "vectors hold the recurrence");
    return;
  } catch (const crt::Error&) {
    // No vectors.
  }
  const crt::Snapshot snapshot = crt::Snapshot::load(path);
  for (const crt::SnapshotTensor& tensor : snapshot.tensors) {
    std::size_t elements = 1;
    for (const std::int64_t size : tensor.shape) elements *= static_cast<std::size_t>(size);
    require(elements == 0 || tensor.data.size() % elements == 0, "a tensor has the bytes of its shape");
  }
}

void parse_external_data(const std::string& path) { crt::external_tensors(*held_file(path).file, path); }

void parse_sidecar(const std::string& path) {
  const crt::EngineSidecar sidecar = crt::sidecar_from_json(content_of(path), "step.json");
  require(sidecar.capacity >= 1, "an engine has a capacity");
}

void parse_profile(const std::string& path) {
  try {
    const crt::JsonValue profile = crt::parse_json(content_of(path));
    if (!profile.is_object()) throw crt::Error(crt::ErrorKind::bundle, "no object");
    if (!crt::profile_problems(profile).empty()) throw crt::Error(crt::ErrorKind::bundle, "an impossible profile");
  } catch (const crt::JsonError& error) {
    throw crt::Error(crt::ErrorKind::bundle, error.what());
  }
}

/// Bytes as the ids of a generation: what comes out is UTF-8, whatever the cuts, and stop strings lose nothing.
void parse_text(const std::string& path) {
  const std::string bytes = content_of(path);
  crt::ModelConfig config;
  config.vocab = 512;
  config.tokenizer = "byte";
  crt::TextStream stream(config);
  crt::StopMatcher stops({"ab", "aab", "\xC3\xA9"});
  std::string text;
  std::string shown;
  std::vector<std::int64_t> ids;
  for (const char byte : bytes) {
    ids.push_back(static_cast<unsigned char>(byte));
    const std::string piece = stream.push(ids.back());
    require(crt::first_invalid_utf8(piece) == std::string::npos, "a piece of text is UTF-8");
    text += piece;
    if (!stops.found()) stops.push(piece, shown);
  }
  const std::string last = stream.finish();
  text += last;
  if (!stops.found()) stops.push(last, shown);
  if (!stops.found()) stops.finish(shown);
  require(text == crt::ByteTokenizer(config).decode(ids), "a stream gives the text of decode()");
  require(text.compare(0, shown.size(), shown) == 0, "stop strings end a text and change none");
  require(stops.found() || shown == text, "without a stop string all text is shown");
  if (crt::first_invalid_utf8(bytes) == std::string::npos) require(text == bytes, "UTF-8 comes back as it was");
}

const std::map<std::string, void (*)(const std::string&)>& parsers() {
  static const std::map<std::string, void (*)(const std::string&)> all = {
      {"manifest", parse_manifest}, {"safetensors", parse_safetensors}, {"external_data", parse_external_data},
      {"sidecar", parse_sidecar},   {"profile", parse_profile},         {"text", parse_text},
  };
  return all;
}

}  // namespace

std::vector<std::string> parser_names() {
  std::vector<std::string> names;
  for (const auto& [name, parser] : parsers()) names.push_back(name);
  return names;
}

bool parse(const std::string& parser, const std::string& path) {
  try {
    parsers().at(parser)(path);
    return true;
  } catch (const crt::Error& error) {
    require(*error.what() != '\0', "a refusal says why");
    return false;
  }
}

}  // namespace crt_fuzz
