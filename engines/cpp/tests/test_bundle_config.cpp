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

TEST_CASE("config: values arrive, derived sizes are filled") {
  BundleFolder bundle;
  bundle.manifest["config"].erase("head_dim");
  bundle.manifest["config"]["num_key_value_heads"] = nullptr;
  bundle.manifest["config"]["sliding_window"] = 5;
  bundle.manifest["config"]["rope_theta"] = 500000;
  bundle.manifest["config"]["rope_layout"] = "half";
  bundle.write_manifest();
  const crt::ModelConfig config = open(bundle).config();
  CHECK(config.recurrent);
  CHECK(config.vocab == 256);
  CHECK(config.head_dim == 4);
  CHECK(config.rope_theta == 500000.0);
  CHECK_FALSE(config.rope_interleaved);
  CHECK(config.sliding_window == std::optional<std::int64_t>(5));
  CHECK(config.eos_token_ids == std::vector<std::int64_t>{3});
  CHECK_FALSE(config.bos_token_id.has_value());
  CHECK(config.tokenizer == "byte");
  bundle.manifest["config"]["eos_token_id"] = {7, 255, 7};
  bundle.write_manifest();
  CHECK(open(bundle).config().eos_token_ids == std::vector<std::int64_t>{7, 255, 7});
  bundle.manifest["config"]["eos_token_id"] = nullptr;
  bundle.write_manifest();
  CHECK(open(bundle).config().eos_token_ids.empty());
}

TEST_CASE("config: each rule") {
  const std::vector<Change> cases{
      {"/model_type", "rwkv", "'model_type' must be one of context_ready_transformer transformer, found 'rwkv'"},
      {"/model_type", Json::array(), "'model_type' must be one of"},
      {"/format_version", 2, "'format_version' must be an integer of at least 1 and at most 1, found 2"},
      {"/num_key_value_heads", 1, "num_key_value_heads different from num_attention_heads"},
      {"/head_dim", 2, "head_dim x num_attention_heads is not hidden_size"},
      {"/head_dim", 0, "'head_dim' must be an integer of at least 1 or null, found 0"},
      {"/head_dim", 4611686018427387904LL, "head_dim x num_attention_heads is not hidden_size"},
      {"/surprise", 1, "unknown key 'surprise'"},
      {"/vocab_size", 1, "'vocab_size' must be an integer of at least 2, found 1"},
      {"/vocab_size", 255, "the byte tokenizer needs a vocab_size of at least 256"},
      {"/vocab_size", true, "'vocab_size' must be an integer of at least 2, found true"},
      {"/vocab_size", 256.0, "'vocab_size' must be an integer of at least 2, found 256"},
      {"/hidden_size", -8, "'hidden_size' must be an integer of at least 1, found -8"},
      {"/hidden_size", 7, "hidden_size is not a multiple of num_attention_heads"},
      {"/hidden_size", 6, "head_dim x num_attention_heads is not hidden_size"},
      {"/num_hidden_layers", 4097, "'num_hidden_layers' must be an integer of at least 1 and at most 4096, found 4097"},
      {"/max_position_embeddings", 1048577, "at least 1 and at most 1048576, found 1048577"},
      {"/max_position_embeddings", 31, "training_sequence_length is above max_position_embeddings"},
      {"/unroll_steps", nullptr, "'unroll_steps' must be an integer of at least 1 and at most 4096, found null"},
      {"/correction_intermediate_size", nullptr, "'correction_intermediate_size' must be an integer of at least 1, found null"},
      {"/sliding_window", 0, "'sliding_window' must be an integer of at least 1 or null, found 0"},
      {"/eos_token_id", 256, "eos_token_id must be in [0, vocab_size = 256), found 256"},
      {"/eos_token_id", {3, 256}, "eos_token_id must be in [0, vocab_size = 256), found 256"},
      {"/eos_token_id", Json::array(), "eos_token_id must be an integer or a list of at least one, found none"},
      {"/eos_token_id", {3, true}, "eos_token_id must be in [0, vocab_size = 256), found true"},
      {"/bos_token_id", -1, "bos_token_id must be in [0, vocab_size = 256), found -1"},
      {"/rope_theta", "1", "'rope_theta' must be a number above 0, found '1'"},
      {"/layer_norm_eps", 0, "'layer_norm_eps' must be a number above 0, found 0"},
      {"/tie_word_embeddings", 1, "'tie_word_embeddings' must be true or false, found 1"},
      {"/tokenizer", "bpe", "'tokenizer' must be one of byte tokenizer.json none, found 'bpe'"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  for (const Change& change : cases) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer("/config" + change.pointer)] = change.value;
    bundle.write_manifest();
    const std::string found = refusal([&] { open(bundle); });
    INFO(change.pointer << ": " << found);
    CHECK(contains(found, bundle.text() + ": the manifest's config is unusable: "));
    CHECK(contains(found, change.message));
  }
}

TEST_CASE("config: all problems at once") {
  BundleFolder bundle;
  bundle.manifest["config"] = {{"model_type", "transformer"}, {"surprise", 1}, {"vocab_size", -1}};
  bundle.write_manifest();
  const std::string found = refusal([&] { open(bundle); });
  INFO(found);
  CHECK(contains(found, "the manifest's config is unusable: 12 problems"));
  CHECK(contains(found, "it lacks 'hidden_size'"));
}

TEST_CASE("config: a plain transformer needs no correction and has no prefill_pass") {
  BundleFolder bundle;
  bundle.manifest["config"]["model_type"] = "transformer";
  bundle.manifest["config"].erase("correction_intermediate_size");
  bundle.manifest["config"].erase("unroll_steps");
  bundle.manifest["contract"] = crt_test::contract_of(false);
  bundle.write_manifest();
  const crt::BundleFiles files = open(bundle);
  CHECK_FALSE(files.config().recurrent);
  CHECK(files.contract("step").inputs.size() == 4);
  CHECK(contains(refusal([&] { files.contract("prefill_pass"); }, crt::ErrorKind::unsupported),
                 "a transformer model has no prefill_pass graph"));
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
  bundle.manifest["contract"] = crt_test::contract_of(false);  // of a plain transformer
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
