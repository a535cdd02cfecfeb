#include "bundle_folder.hpp"

#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "bundle/integrity.hpp"
#include "bundle/json.hpp"
#include "bundle/sha256.hpp"

namespace crt_test {
namespace {

namespace fs = std::filesystem;

fs::path new_folder() {
  std::string name = (fs::temp_directory_path() / "crt_bundle_XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no temporary folder");
  return fs::canonical(name);
}

void store(const fs::path& path, const std::string& content) {
  fs::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << content;
}

Json target(const std::string& name, const std::string& runtime) {
  const bool compiled = runtime != "onnxruntime";
  Json profile = {{"name", name},
                  {"title", "test"},
                  {"runtime", runtime},
                  {"device", compiled ? "cuda" : "cpu"},
                  {"precision", compiled ? "fp16" : "fp32"},
                  {"compute_capability", nullptr},
                  {"capacity", 32},
                  {"batch", {1, 1, 4}},
                  {"seq", {1, 8, 16}},
                  {"residual_dtype", compiled ? "float16" : "float32"},
                  {"unroll", nullptr},
                  {"attention", "auto"},
                  {"threads", compiled ? 0 : 2},
                  {"options", Json::object()}};
  if (compiled) profile["compute_capability"] = 80;
  Json engines = Json::object();
  if (compiled) engines["step"] = "engines/" + name + "/step.engine";
  return {{"profile", profile},   {"graphs", {{"step", "graphs/step.fp32.onnx"}}},
          {"engines", engines},   {"capacity", 32},
          {"unroll", 4},          {"cache_dtype", compiled ? "float16" : "float32"},
          {"prefill",
           {{"method", "passes"},
            {"passes", 4},
            {"chunk", nullptr},
            {"shortest", 1},
            {"residual_bound", nullptr},
            {"perplexity_gap", nullptr}}}};
}

Json sidecar() {
  return {{"graph", "step"},
          {"unroll", 1},
          {"runtime_version", "1.7.1.4"},
          {"target", "rtx"},
          {"runtime", "tensorrt-rtx"},
          {"compute_capability", 80},
          {"capacity", 32},
          {"options", {{"ampere_plus", false}}},
          {"inputs",
           {{{"name", "input_ids"}, {"dtype", "int64"}, {"dims", {"batch", 1}}, {"min", {1, 1}}, {"opt", {1, 1}},
             {"max", {4, 1}}}}}};
}

}  // namespace

Json model_of(bool iterated) {
  Json model{{"architecture", iterated ? "context_ready_transformer" : "transformer"},
             {"vocab", 256},
             {"hidden", 8},
             {"max_positions", 64},
             {"tokenizer", "byte"},
             {"bos_token_id", nullptr},
             {"eos_token_ids", {3}},
             {"states", Json::array()},
             {"caches", Json::array()},
             {"rotaries", Json::array()},
             {"passes", iterated ? 4 : 1},
             {"parallel", true},
             {"iterated", iterated},
             {"prompt", "causal"},
             {"relative", true}};
  if (iterated) model["states"].push_back({{"name", "hidden"}, {"shape", {8}}, {"dtype", "float32"}});
  model["caches"].push_back(
      {{"name", "0"}, {"heads", 2}, {"query_heads", 2}, {"head_dim", 4}, {"window", nullptr}, {"rotary", 0}});
  model["rotaries"].push_back({{"layout", "interleaved"}, {"frequencies", {1, 0.01}}});
  return model;
}

Json contract_of(bool iterated) {
  const auto tensor = [](const std::string& name, const char* dtype, Json dims) {
    return Json{{"name", name}, {"dtype", dtype}, {"dims", std::move(dims)}};
  };
  const Json batch = Json::array({"batch"}), state = Json::array({"batch", 1, 8});
  const Json iterate = Json::array({"batch", "seq", 8}), cache = Json::array({"batch", 2, "capacity", 4});
  const auto graph = [&](bool prefill) {
    Json inputs = Json::array(), outputs = Json::array(), aliases = Json::array();
    inputs.push_back(tensor("input_ids", "int64", prefill ? Json::array({"batch", "seq"}) : Json::array({"batch", 1})));
    if (prefill) inputs.push_back(tensor("length", "int64", batch));
    inputs.push_back(tensor("position", "int64", batch));
    if (iterated) inputs.push_back(tensor("state", "float32", state));
    if (iterated && prefill) inputs.push_back(tensor("hidden", "float32", iterate));
    outputs.push_back(tensor("logits", "float32", Json::array({"batch", 256})));
    outputs.push_back(tensor("next_token", "int64", Json::array({"batch", 1})));
    outputs.push_back(tensor("next_position", "int64", batch));
    if (iterated) outputs.push_back(tensor("next_state", "float32", state));
    if (prefill) outputs.push_back(tensor("next_hidden", "float32", iterate));
    if (iterated && prefill) outputs.push_back(tensor("residual", "float32", batch));
    for (const char* part : {"key", "value"}) {
      const std::string past = std::string("past_key_values.0.") + part, present = "present" + past.substr(4);
      inputs.push_back(tensor(past, "float32", cache));
      outputs.push_back(tensor(present, "float32", cache));
      aliases.push_back(Json::array({present, past}));
    }
    Json continues = Json::array();
    const auto continued = [&](const char* output, const char* input) {
      continues.push_back(Json::array({output, input}));
    };
    continued("next_token", "input_ids");
    continued("next_position", "position");
    if (iterated) continued("next_state", "state");
    if (iterated && prefill) continued("next_hidden", "hidden");
    return Json{{"inputs", inputs}, {"outputs", outputs}, {"aliases", aliases}, {"continues", continues}};
  };
  Json contract{{"step", graph(false)}, {"prefill", graph(true)}};
  if (iterated) contract["prefill_pass"] = graph(true);
  contract["head"] = {{"inputs", Json::array({tensor("hidden", "float32", iterate)})},
                      {"outputs", Json::array({tensor("logits", "float32", Json::array({"batch", "seq", 256}))})},
                      {"aliases", Json::array()},
                      {"continues", Json::array()}};
  return contract;
}

std::string refusal(const std::function<void()>& action, crt::ErrorKind kind) {
  try {
    action();
  } catch (const crt::Error& error) {
    return (error.kind() == kind ? "" : "of another kind: ") + std::string(error.what());
  }
  return "";
}

std::string proto_varint(std::uint64_t value) {
  std::string bytes;
  for (; value > 0x7F; value >>= 7U) bytes += static_cast<char>((value & 0x7FU) | 0x80U);
  return bytes + static_cast<char>(value);
}

std::string proto_number(std::uint64_t field, std::uint64_t value) {
  return proto_varint(field << 3U) + proto_varint(value);
}

std::string proto_bytes(std::uint64_t field, const std::string& payload) {
  return proto_varint(field << 3U | 2U) + proto_varint(payload.size()) + payload;
}

std::string external_tensor(const std::string& name, const std::string& location) {
  return proto_bytes(8, name) + proto_bytes(13, proto_bytes(1, "offset") + proto_bytes(2, "0")) +
         proto_bytes(13, proto_bytes(1, "location") + proto_bytes(2, location)) + proto_number(14, 1);
}

std::string model_with(const std::string& tensor) {
  return proto_number(1, 10) + proto_bytes(7, proto_bytes(5, tensor));
}

BundleFolder::BundleFolder(const std::string& location) : parent_(new_folder()) {
  manifest = {{"schema_version", 1},
              {"tool", {{"name", "crt-export"}, {"version", "0.1.0"}}},
              {"libraries", Json::object()},
              {"validated", true},
              {"config", {{"model_type", "never read"}}},
              {"model", model_of(true)},
              {"checkpoint", {{"sha256", std::string(64, '0')}}},
              {"options", Json::object()},
              {"contract", contract_of(true)},
              {"graphs", Json::array()},
              {"quantization", Json::object()},
              {"targets", {{"ort", target("ort", "onnxruntime")}, {"rtx", target("rtx", "tensorrt-rtx")}}},
              {"files", Json::object()},
              {"parity", {{"passed", true}}}};
  manifest["graphs"].push_back({{"file", "graphs/step.fp32.onnx"},
                                {"graph", "step"},
                                {"precision", "fp32"},
                                {"unroll", nullptr},
                                {"weights", "graphs/fp32.weights"},
                                {"quantized_matmuls", 0},
                                {"roles", {"session"}}});
  write("graphs/fp32.weights", std::string(64, 'w'));
  write("graphs/step.fp32.onnx", model_with(external_tensor("w", location)));
  write("engines/rtx/step.engine", "plan");
  write("engines/rtx/step.json", sidecar().dump());
  write("report.md", "first");
  write_manifest();
}

BundleFolder::~BundleFolder() {
  std::error_code problem;  // a folder that stays behind is no reason to end the program
  fs::remove_all(parent_, problem);
}

void BundleFolder::write(const std::string& name, const std::string& content) {
  store(path() / name, content);
  manifest["files"][name] = {{"size", content.size()}, {"sha256", crt::sha256_hex(content.data(), content.size())}};
}

std::string BundleFolder::manifest_text() const {
  Json whole = manifest;
  try {
    const crt::ManifestDigests digests = crt::manifest_digests(crt::parse_json(manifest.dump()));
    whole["integrity"] = {{"manifest", digests.manifest}, {"files", digests.files}};
  } catch (const crt::JsonError&) {  // a manifest that no reader takes has no digests
  }
  return whole.dump();
}

void BundleFolder::write_manifest() const { write_manifest(manifest_text()); }

void BundleFolder::write_manifest(const std::string& content) const { store(path() / "manifest.json", content); }

}  // namespace crt_test
