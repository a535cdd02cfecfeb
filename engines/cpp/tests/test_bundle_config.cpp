// What the manifest says about the model and its targets: taken where it can be true, refused with every reason.
#include <doctest/doctest.h>

#include <string>
#include <utility>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "bundle_folder.hpp"

namespace {

using crt_test::BundleFolder;
using crt_test::Json;
using crt_test::refusal;

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

crt::BundleFiles open(const BundleFolder& bundle) { return crt::BundleFiles::open(bundle.text(), false); }

/// A JSON pointer, the value to put there, and what the refusal says.
struct Change {
  std::string pointer;
  Json value;
  std::string message;
};

}  // namespace

TEST_CASE("model: values arrive, and the configuration is not read") {
  BundleFolder bundle;
  Json& model = bundle.manifest["model"];
  model["caches"][0]["window"] = 5;
  model["rotaries"][0] = {{"layout", "half"}, {"frequencies", {1, 0}}};
  bundle.write_manifest();
  crt::ModelConfig config = open(bundle).config();
  CHECK(config.architecture == "context_ready_transformer");
  CHECK(config.iterated);
  CHECK(config.passes == 4);
  CHECK(config.vocab == 256);
  CHECK(config.hidden == 8);
  REQUIRE(config.states.size() == 1);
  CHECK(config.states[0].name == "hidden");
  CHECK(config.states[0].shape == std::vector<std::int64_t>{8});
  REQUIRE(config.caches.size() == 1);
  CHECK(config.caches[0].heads == 2);
  CHECK(config.caches[0].head_dim == 4);
  CHECK(config.caches[0].rotary == std::optional<std::size_t>(0));
  CHECK_FALSE(config.rotaries[0].interleaved);
  CHECK(config.rotaries[0].frequencies == std::vector<double>{1.0, 0.0});
  CHECK(config.eos_token_ids == std::vector<std::int64_t>{3});
  CHECK_FALSE(config.bos_token_id.has_value());
  CHECK(config.tokenizer == "byte");
  CHECK(config.window() == std::optional<std::int64_t>(5));
  config.caches.push_back(config.caches[0]);
  config.caches[1].window = 9;
  CHECK(config.window() == std::optional<std::int64_t>(9));  // the widest
  config.relative = false;
  CHECK_FALSE(config.window().has_value());
  config.relative = true;
  config.caches[0].window.reset();
  CHECK_FALSE(config.window().has_value());
}

TEST_CASE("model: each rule of the schema") {
  const std::vector<Change> cases{
      {"/vocab", 0, "model: 'vocab' must be an integer of at least 1 and at most 2147483647, found 0"},
      {"/vocab", true, "'vocab' must be an integer of at least 1 and at most 2147483647, found true"},
      {"/vocab", 256.0, "'vocab' must be an integer"},
      {"/hidden", -8, "'hidden' must be an integer"},
      {"/max_positions", 4294967296LL, "'max_positions' must be an integer"},
      {"/passes", nullptr, "'passes' must be an integer"},
      {"/tokenizer", 1, "'tokenizer' must be a text, found 1"},
      {"/relative", 1, "'relative' must be true or false, found 1"},
      {"/eos_token_ids", 3, "'eos_token_ids' must be a list, found 3"},
      {"/eos_token_ids", {3, 256}, "model: a token must be in [0, vocab = 256), found 256"},
      {"/eos_token_ids", {3, true}, "model: a token must be in [0, vocab = 256), found true"},
      {"/bos_token_id", -1, "model: a token must be in [0, vocab = 256), found -1"},
      {"/states", Json::array({1}), "model.states[0] must be an object, found 1"},
      {"/states/0/dtype", "float16", "model.states[0]: 'dtype' must be one of float32, found 'float16'"},
      {"/states/0/name", "a.b", "model.states: expected a plain name, found 'a.b'"},
      {"/states/0/name", "", "model.states: expected a plain name, found ''"},
      {"/states/0/shape", Json::array(), "model.states: the shape of 'hidden' must be sizes of 1 or more"},
      {"/states/0/shape", {8, 0}, "model.states: the shape of 'hidden' must be sizes of 1 or more"},
      {"/states/0/shape", {4294967296LL, 4294967296LL}, "model.states: the shape of 'hidden' must be"},
      {"/caches/0/heads", 0, "model.caches[0]: 'heads' must be an integer"},
      {"/caches/0/head_dim", 2147483647, "model.caches: '0' is larger than any model's"},
      {"/caches/0/window", 0, "model.caches[0]: 'window' must be an integer"},
      {"/caches/0/rotary", -1, "model.caches[0]: 'rotary' must be an integer of at least 0 or null, found -1"},
      {"/rotaries/0/layout", "spiral", "'layout' must be one of interleaved half, found 'spiral'"},
      {"/rotaries/0/frequencies", {1, "2"}, "model.rotaries: frequencies must be numbers"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  const auto refused = [&](const std::string& prefix, const Change& change) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer("/model" + change.pointer)] = change.value;
    bundle.write_manifest();
    const std::string found = refusal([&] { open(bundle); });
    INFO(change.pointer << ": " << found);
    CHECK(contains(found, prefix));
    CHECK(contains(found, change.message));
  };
  for (const Change& change : cases) refused("breaks schema version 1: ", change);
  const std::vector<Change> contradictions{
      {"/iterated", false, "iterated is false, its states say otherwise"},
      {"/parallel", false, "iterated is true, its states say otherwise"},
      {"/states/0/shape", {7}, "the state 'hidden' is what the head reads, so it has the shape [8]"},
      {"/states/1", sound.manifest["model"]["states"][0], "two states are called 'hidden'"},
      {"/caches/0/rotary", 1, "cache '0' names rotation 1 of 1"},
      {"/rotaries/0/frequencies", {1, 2, 3}, "cache '0' has heads of 4 channels, and its rotation not as many pairs"},
  };
  for (const Change& change : contradictions) {
    refused(bundle.text() + ": the manifest's model is unusable: ", change);
  }
}

TEST_CASE("model: all problems at once") {
  BundleFolder bundle;
  bundle.manifest["model"] = {{"architecture", "x"}, {"vocab", -1}};
  bundle.write_manifest();
  const std::string found = refusal([&] { open(bundle); });
  INFO(found);
  CHECK(contains(found, "breaks schema version 1: 14 problems"));
  CHECK(contains(found, "model lacks 'hidden'"));
}

TEST_CASE("model: without states there are no passes and no prefill_pass") {
  BundleFolder bundle;
  bundle.manifest["model"] = crt_test::model_of(false);
  bundle.manifest["contract"] = crt_test::contract_of(false);
  bundle.write_manifest();
  const crt::BundleFiles files = open(bundle);
  CHECK_FALSE(files.config().iterated);
  CHECK(files.contract("step").inputs.size() == 4);
  CHECK(contains(refusal([&] { files.contract("prefill_pass"); }, crt::ErrorKind::unsupported),
                 "a transformer model has no prefill_pass graph"));
}

TEST_CASE("contract: states, iterates and caches are the model's, each of its own shape") {
  crt::ModelConfig model;
  model.vocab = 256;
  model.hidden = 8;
  model.iterated = true;
  model.states = {{"hidden", {8}}, {"notes", {2, 3}}};
  model.caches = {{"a", 2, 4, {}, {}}, {"b", 1, 6, {}, {}}};
  const auto dims_of = [](const std::vector<crt::TensorSpec>& specs, const std::string& name) {
    for (const crt::TensorSpec& spec : specs) {
      if (spec.name == name) return spec.dims;
    }
    return crt::Shape();
  };
  const crt::GraphContract pass = crt::graph_contract("prefill_pass", model);
  CHECK(pass.inputs.size() == 3 + 4 + 4);
  CHECK(pass.outputs.size() == 3 + 4 + 1 + 4);
  CHECK(dims_of(pass.inputs, "state.notes") == crt::Shape{-1, 1, 2, 3});
  CHECK(dims_of(pass.inputs, "iterate.notes") == crt::Shape{-1, -2, 2, 3});
  CHECK(dims_of(pass.outputs, "next_iterate.notes") == crt::Shape{-1, -2, 2, 3});
  CHECK(dims_of(pass.inputs, "past_key_values.1.key") == crt::Shape{-1, 1, -3, 6});
  CHECK(crt::graph_contract("step", model).continues ==
        std::vector<std::pair<std::string, std::string>>{{"next_token", "input_ids"},
                                                         {"next_position", "position"},
                                                         {"next_state", "state"},
                                                         {"next_state.notes", "state.notes"}});
  model.iterated = false;  // states that advance within one pass
  const crt::GraphContract prefill = crt::graph_contract("prefill", model);
  CHECK(prefill.inputs.size() == 3 + 2 + 4);
  CHECK(dims_of(prefill.outputs, "next_hidden") == crt::Shape{-1, -2, 8});
  CHECK(dims_of(prefill.outputs, "residual").empty());
}

TEST_CASE("contract: it is read from the manifest") {
  const BundleFolder bundle;
  const crt::BundleFiles files = open(bundle);
  const crt::GraphContract& step = files.contract("step");
  REQUIRE(step.inputs.size() == 5);
  CHECK(step.inputs[2].name == "state");
  CHECK(step.inputs[2].dims == crt::Shape{-1, 1, 8});
  CHECK(step.inputs[3].name == "past_key_values.0.key");
  CHECK(step.inputs[3].dims == crt::Shape{-1, 2, -3, 4});
  CHECK(step.aliases[0] == std::pair<std::string, std::string>("present_key_values.0.key", "past_key_values.0.key"));
  CHECK(files.contract("prefill").outputs.size() == 8);
  CHECK(files.contract("prefill_pass").inputs.size() == files.contract("prefill").inputs.size());
}

TEST_CASE("contract: one that a session could not bind is refused") {
  const Json tensor{{"name", "x"}, {"dtype", "float32"}, {"dims", {"batch", 4}}};
  const std::vector<Change> cases{
      {"/step/inputs/0/dims/1", 2, "step: input input_ids: int64 [?, 2] was expected to be int64 [?, 1]"},
      {"/step/inputs/0/dims/0", "seq", "step: input input_ids"},
      {"/step/inputs/0/dims/0", -1, "step: input input_ids"},
      {"/step/inputs/0/dims/1", true, "step: input input_ids"},
      {"/step/inputs/0/dtype", "float32", "step: input input_ids: float32 [?, 1] was expected to be"},
      {"/step/inputs/0/dtype", "int8", "step: input input_ids has dtype 'int8'"},
      {"/step/inputs/3/dtype", "float16", "step: input past_key_values.0.key has dtype 'float16'"},
      {"/step/inputs/3/dims/3", 8, "step: input past_key_values.0.key: float32 [?, 2, ?, 8] was expected"},
      {"/step/inputs/2/name", "stat", "step: input stat is not part of the contract"},
      {"/step/outputs/3/dims/2", 16, "step: output next_state"},
      {"/step/outputs/0/dims/1", 512, "step: output logits: float32 [?, 512] was expected"},
      {"/prefill/inputs/7", tensor, "prefill: input x is not part of the contract"},
      {"/prefill/outputs/8", tensor, "prefill: output x is not part of the contract"},
      {"/prefill/aliases", Json::array(), "prefill: aliases must give"},
      {"/prefill/aliases/0/1", "past_key_values.0.value", "prefill: aliases must give"},
      {"/step/continues/2/1", "position", "step: continues must pair"},
      {"/step/continues", Json::array(), "step: continues must pair"},
      {"/head/outputs/0/dims/1", 1, "head: output logits"},
      {"/other", crt_test::contract_of(true)["step"], "'other' is no graph of this model"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  const auto refused = [&](const std::string& message) {
    bundle.write_manifest();
    const std::string found = refusal([&] { open(bundle); });
    INFO(found);
    CHECK(contains(found, bundle.text() + ": the manifest's contract is unusable: "));
    CHECK(contains(found, message));
  };
  for (const Change& change : cases) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer("/contract" + change.pointer)] = change.value;
    refused(change.message);
  }
  bundle.manifest = sound.manifest;
  bundle.manifest["contract"].erase("step");
  refused("'step' of 'ort' is missing");
  bundle.manifest = sound.manifest;
  bundle.manifest["contract"]["step"]["outputs"].erase(3);
  refused("step: output next_state is missing");
  bundle.manifest = sound.manifest;
  bundle.manifest["contract"]["step"]["inputs"].push_back(sound.manifest["contract"]["step"]["inputs"][0]);
  refused("step: input a name stands twice");
  bundle.manifest = sound.manifest;
  bundle.manifest["contract"] = crt_test::contract_of(false);  // of a model without states
  refused("step: input state is missing");
}

TEST_CASE("target: values arrive") {
  BundleFolder bundle;
  bundle.manifest["targets"]["ort"]["profile"]["options"] = {
      {"graph_optimization", "basic"},
      {"disabled_optimizers", {"MatMulAddFusion"}},
      {"spinning", false},
      {"huge_pages", false}};
  bundle.write_manifest();
  const crt::BundleFiles files = open(bundle);
  const crt::Target& ort = files.target("ort");
  CHECK(ort.runtime == "onnxruntime");
  CHECK(ort.graphs.at("step") == "graphs/step.fp32.onnx");
  CHECK(ort.capacity == 32);
  CHECK(ort.unroll == std::optional<std::int64_t>(4));
  CHECK(ort.max_tokens == 16);
  CHECK(ort.max_batch == 4);
  CHECK(ort.threads == 2);
  CHECK(ort.ort.graph_optimization == "basic");
  CHECK(ort.ort.disabled_optimizers == std::vector<std::string>{"MatMulAddFusion"});
  CHECK_FALSE(ort.ort.spinning);
  CHECK_FALSE(ort.ort.huge_pages);
  const crt::Target& rtx = files.target("rtx");
  CHECK(rtx.compute_capability == std::optional<int>(80));
  CHECK(rtx.cache_dtype == crt::DType::float16);
  CHECK(rtx.engines.at("step") == "engines/rtx/step.engine");
}

TEST_CASE("target: the capacity is never above the model's positions") {
  BundleFolder bundle;
  bundle.manifest["targets"]["ort"]["capacity"] = 9223372036854775807LL;
  bundle.write_manifest();
  CHECK(open(bundle).target("ort").capacity == 64);
}

TEST_CASE("target: each rule of a profile, and only that target is refused") {
  const std::vector<Change> cases{
      {"/runtime", "tensorflow", "'runtime' must be one of onnxruntime tensorrt tensorrt-rtx, found 'tensorflow'"},
      {"/runtime", Json::array(), "'runtime' must be one of"},
      {"/device", nullptr, "'device' must be one of cpu cuda, found null"},
      {"/precision", "int4", "'precision' must be one of fp32 fp16 w8 w8a8, found 'int4'"},
      {"/device", "cuda", "threads is for device cpu"},
      {"/runtime", "tensorrt", "tensorrt on cpu does not run fp32"},
      {"/name", "FP 32", "name 'FP 32' cannot name files"},
      {"/name", "fp32", "name 'fp32' cannot name files"},
      {"/title", " ", "title must be one line"},
      {"/capacity", 0, "'capacity' must be an integer of at least 1, found 0"},
      {"/capacity", true, "'capacity' must be an integer of at least 1, found true"},
      {"/capacity", 8, "seq exceeds the capacity"},
      {"/threads", -1, "'threads' must be an integer of at least 0 and at most 1024, found -1"},
      {"/threads", 1000000, "at most 1024, found 1000000"},
      {"/unroll", 0, "'unroll' must be an integer of at least 1 or null, found 0"},
      {"/batch", {1, 2}, "batch must be [min, opt, max], rising and each at least 1"},
      {"/seq", {1, 2.0, 3}, "seq must be [min, opt, max], rising and each at least 1"},
      {"/seq", {4, 2, 8}, "seq must be [min, opt, max], rising and each at least 1"},
      {"/residual_dtype", "float16", "residual_dtype must be float32 with precision fp32"},
      {"/attention", "fused", "attention is for TensorRT"},
      {"/compute_capability", 80, "compute_capability is none that onnxruntime has"},
      {"/options", nullptr, "'options' must be an object, found null"},
      {"/options/graph_optimization", "most", "'graph_optimization' must be one of disable basic extended all, found"},
      {"/options/disabled_optimizers", {1}, "options.disabled_optimizers must be a list of names"},
      {"/options/disabled_optimizers", {"a;b"}, "options.disabled_optimizers must be a list of names"},
      {"/options/spinning", 1, "options: 'spinning' must be true or false, found 1"},
      {"/options/huge_pages", "no", "options: 'huge_pages' must be true or false, found 'no'"},
      {"/options/spining", true, "options has the unknown key 'spining'"},
      {"/capacities", 1, "unknown key 'capacities'"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  for (const Change& change : cases) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer("/targets/ort/profile" + change.pointer)] = change.value;
    bundle.write_manifest();
    const crt::BundleFiles files = open(bundle);
    CHECK(files.target("rtx").name == "rtx");
    const std::string found = refusal([&] { files.target("ort"); });
    INFO(change.pointer << ": " << found);
    CHECK(contains(found, "engine profile ort of " + bundle.text() + ": "));
    CHECK(contains(found, change.message));
  }
}

TEST_CASE("target: rules of compiled profiles") {
  const std::vector<Change> cases{
      {"/compute_capability", 90, "compute_capability is none that tensorrt-rtx has"},
      {"/precision", "fp32", "tensorrt-rtx on cuda does not run fp32"},
      {"/options/ampere_plus", true, "ampere_plus and version_compatible do not apply to tensorrt-rtx"},
      {"/options/optimization_level", 6, "'optimization_level' must be an integer of at least 0 and at most 5, found 6"},
      {"/options/workspace_mib", -1, "'workspace_mib' must be an integer of at least 0, found -1"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  for (const Change& change : cases) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer("/targets/rtx/profile" + change.pointer)] = change.value;
    bundle.write_manifest();
    const std::string found = refusal([&] { open(bundle).target("rtx"); });
    INFO(change.pointer << ": " << found);
    CHECK(contains(found, change.message));
  }
}

TEST_CASE("target: an unknown one is the caller's mistake") {
  const BundleFolder bundle;
  const crt::BundleFiles files = open(bundle);
  CHECK(contains(refusal([&] { files.target("gpu"); }, crt::ErrorKind::input),
                 "unknown target 'gpu': " + bundle.text() + " was built for ort, rtx"));
}
