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
      {"/model_type", "rwkv", "model_type must be one of context_ready_transformer, transformer, found 'rwkv'"},
      {"/model_type", Json::array(), "model_type must be one of"},
      {"/format_version", 2, "format_version 2 (this version reads 1; upgrade crt-export)"},
      {"/num_key_value_heads", 1, "num_key_value_heads 1 different from num_attention_heads (grouped queries)"},
      {"/head_dim", 2, "head_dim 2 x 2 heads different from hidden_size"},
      {"/head_dim", 0, "head_dim must be at least 1, found 0"},
      {"/head_dim", 4611686018427387904LL, "heads different from hidden_size"},
      {"/surprise", 1, "unknown key 'surprise'; known keys: bos_token_id, correction"},
      {"/vocab_size", 1, "vocab_size must be at least 2, found 1"},
      {"/vocab_size", 255, "the byte tokenizer needs vocab_size >= 256, found 255"},
      {"/vocab_size", true, "vocab_size must be an integer, found True"},
      {"/vocab_size", 256.0, "vocab_size must be an integer, found 256.0"},
      {"/hidden_size", -8, "hidden_size must be greater than 0, found -8"},
      {"/hidden_size", 7, "hidden_size 7 is not a multiple of num_attention_heads 2"},
      {"/hidden_size", 6, "different from hidden_size"},
      {"/num_hidden_layers", 4097, "num_hidden_layers must be at most 4096 in this version, found 4097"},
      {"/max_position_embeddings", 1048577, "max_position_embeddings must be at most 1048576"},
      {"/max_position_embeddings", 31, "training_sequence_length 32 is above max_position_embeddings 31"},
      {"/unroll_steps", nullptr, "unroll_steps must be an integer, found None"},
      {"/correction_intermediate_size", nullptr, "correction_intermediate_size must be greater than 0, found None"},
      {"/sliding_window", 0, "sliding_window must be greater than 0, found 0"},
      {"/eos_token_id", 256, "eos_token_id must be in [0, vocab_size = 256), found 256"},
      {"/eos_token_id", {3, 256}, "eos_token_id must be in [0, vocab_size = 256), found 256"},
      {"/eos_token_id", Json::array(), "eos_token_id must be an integer or a list of at least one, found []"},
      {"/eos_token_id", {3, true}, "eos_token_id must be an integer or a list of at least one, found [3, True]"},
      {"/bos_token_id", -1, "bos_token_id must be in [0, vocab_size = 256), found -1"},
      {"/rope_theta", "1", "rope_theta must be a finite number, found '1'"},
      {"/layer_norm_eps", 0, "layer_norm_eps must be greater than 0, found 0"},
      {"/tie_word_embeddings", 1, "tie_word_embeddings must be true or false, found 1"},
      {"/tokenizer", "bpe", "tokenizer must be one of byte, tokenizer.json, none, found 'bpe'"},
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
  CHECK(contains(found, "config.json: 12 problems"));
  CHECK(contains(found, "missing key 'hidden_size'"));
}

TEST_CASE("config: a plain transformer needs no correction and has no prefill_pass") {
  BundleFolder bundle;
  bundle.manifest["config"]["model_type"] = "transformer";
  bundle.manifest["config"].erase("correction_intermediate_size");
  bundle.manifest["config"].erase("unroll_steps");
  bundle.write_manifest();
  const crt::BundleFiles files = open(bundle);
  CHECK_FALSE(files.config().recurrent);
  CHECK(files.contract("step").inputs.size() == 4);
  CHECK(contains(refusal([&] { files.contract("prefill_pass"); }, crt::ErrorKind::unsupported),
                 "a transformer model has no prefill_pass graph"));
}

TEST_CASE("contract: it follows from the configuration, not from what the manifest claims") {
  const BundleFolder bundle;  // its manifest claims one input, x: [batch, 4]
  const crt::BundleFiles files = open(bundle);
  const crt::GraphContract& step = files.contract("step");
  REQUIRE(step.inputs.size() == 5);
  CHECK(step.inputs[2].name == "state");
  CHECK(step.inputs[2].dims == crt::Shape{-1, 1, 8});
  CHECK(step.inputs[3].name == "past_key_values.0.key");
  CHECK(step.inputs[3].dims == crt::Shape{-1, 2, -1, 4});
  CHECK(step.aliases[0] == std::pair<std::string, std::string>("present_key_values.0.key", "past_key_values.0.key"));
  CHECK(files.contract("prefill").outputs.size() == 8);
  CHECK(files.contract("prefill_pass").inputs.size() == files.contract("prefill").inputs.size());
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
      {"/runtime", "tensorflow", "runtime must be one of onnxruntime, tensorrt, tensorrt-rtx, not 'tensorflow'"},
      {"/runtime", Json::array(), "runtime must be one of"},
      {"/device", nullptr, "device must be one of cpu, cuda, not None"},
      {"/precision", "int4", "precision must be one of fp32, fp16, w8, w8a8, not 'int4'"},
      {"/device", "cuda", "threads is for device cpu"},
      {"/runtime", "tensorrt", "tensorrt does not run on cpu"},
      {"/name", "FP 32", "name must be lower-case letters"},
      {"/name", "fp32", "is the name of a precision"},
      {"/title", " ", "title must be one line"},
      {"/capacity", 0, "capacity must be at least 1 token, not 0"},
      {"/capacity", true, "capacity must be at least 1 token, not True"},
      {"/capacity", 8, "seq may not exceed the capacity of 8 tokens, but its largest size is 16"},
      {"/threads", -1, "threads must be 0 (all) or more, at most 1024, not -1"},
      {"/threads", 1000000, "threads must be 0 (all) or more, at most 1024, not 1000000"},
      {"/unroll", 0, "unroll must be at least 1 pass, not 0"},
      {"/batch", {1, 2}, "batch must be [min, opt, max], each at least 1, not [1, 2]"},
      {"/seq", {1, 2.0, 3}, "seq must be [min, opt, max], each at least 1, not [1, 2.0, 3]"},
      {"/seq", {4, 2, 8}, "seq must rise from min over opt to max, not [4, 2, 8]"},
      {"/residual_dtype", "float16", "residual_dtype must be float32 with precision fp32"},
      {"/attention", "fused", "attention is for TensorRT"},
      {"/compute_capability", 80, "compute_capability is for TensorRT, not for onnxruntime"},
      {"/options", nullptr, "options must be a table, not None"},
      {"/options/graph_optimization", "most", "graph_optimization must be one of disable, basic, extended, all, not"},
      {"/options/disabled_optimizers", {1}, "options.disabled_optimizers must be a list of names, not [1]"},
      {"/options/disabled_optimizers", {"a;b"}, "options.disabled_optimizers must be a list of names, not ['a;b']"},
      {"/options/spinning", 1, "options.spinning must be true or false, not 1"},
      {"/options/huge_pages", "no", "options.huge_pages must be true or false, not 'no'"},
      {"/options/spining", true, "unknown key 'options.spining' (did you mean 'spinning'?)"},
      {"/capacities", 1, "unknown key 'capacities' (did you mean 'capacity'?)"},
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
      {"/compute_capability", 90, "of a tensorrt-rtx profile must be one of 75, 80, 86, 89, 120, 121 (80 is SM 8.0)"},
      {"/precision", "fp32", "tensorrt-rtx on cuda runs fp16, w8a8, not fp32"},
      {"/options/ampere_plus", true, "options.ampere_plus does not apply to tensorrt-rtx"},
      {"/options/optimization_level", 6, "options.optimization_level must be 0 to 5, not 6"},
      {"/options/workspace_mib", -1, "options.workspace_mib must be 0 or more MiB, not -1"},
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
