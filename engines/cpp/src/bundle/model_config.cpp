#include "bundle/model_config.hpp"

#include <string>
#include <vector>

#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;

constexpr char kRecurrent[] = "context_ready_transformer";
constexpr double kMostPositions = 1U << 20U;
constexpr double kMostLayers = 4096;
constexpr std::int64_t kByteVocabulary = 256;

const MemberRules& key_rules() {
  static const MemberRules rules{
      {"format_version", kInteger | kOptional, 1, 1},
      {"model_type", kText, 0, 0, "context_ready_transformer transformer"},
      {"vocab_size", kInteger, 2},  // one token leaves nothing to predict
      {"hidden_size", kInteger, 1},
      {"num_hidden_layers", kInteger, 1, kMostLayers},
      {"num_attention_heads", kInteger, 1},
      {"num_key_value_heads", kInteger | kNull | kOptional, 1},
      {"head_dim", kInteger | kNull | kOptional, 1},
      {"intermediate_size", kInteger, 1},
      {"correction_intermediate_size", kInteger | kNull | kOptional},
      {"unroll_steps", kInteger | kOptional, 1, kMostLayers},
      {"max_position_embeddings", kInteger, 1, kMostPositions},
      {"training_sequence_length", kInteger | kNull | kOptional, 1},
      {"sliding_window", kInteger | kNull | kOptional, 1},
      {"layer_norm_eps", kNumber, kAboveZero},
      {"rope_theta", kNumber, kAboveZero},
      {"rope_layout", kText, 0, 0, "interleaved half"},
      {"tie_word_embeddings", kBoolean},
      {"tokenizer", kText, 0, 0, "byte tokenizer.json none"},
      {"bos_token_id", kInteger | kNull | kOptional},
      {"eos_token_id", kInteger | kList | kNull | kOptional},
  };
  return rules;
}

/// No more than this is asked for in addition where the model recurs.
const MemberRules& recurrent_rules() {
  static const MemberRules rules{{"correction_intermediate_size", kInteger, 1}, {"unroll_steps", kInteger}};
  return rules;
}

std::optional<std::int64_t> integer(const JsonValue& config, const char* name) {
  const JsonValue* value = given(config, name);
  return value == nullptr ? std::nullopt : std::optional(value->integer());
}

/// Token ids: none, one, or a list of at least one; each within the vocabulary.
std::vector<std::int64_t> token_ids(const JsonValue& config, const char* name, std::int64_t vocab, Problems& problems) {
  const JsonValue* value = given(config, name);
  std::vector<std::int64_t> ids;
  if (value == nullptr) return ids;
  const auto take = [&](const JsonValue& id) {
    ids.push_back(id.is_integer() ? id.integer() : -1);
    if (ids.back() >= 0 && ids.back() < vocab) return;
    problems.push_back(std::string(name) + " must be in [0, vocab_size = " + std::to_string(vocab) + "), found " +
                       shown(id));
  };
  if (value->is_integer()) {
    take(*value);
    return ids;
  }
  for (const JsonValue& id : value->array()) take(id);
  if (ids.empty()) problems.push_back(std::string(name) + " must be an integer or a list of at least one, found none");
  return ids;
}

/// What no rule about one key can say.
Problems relation_problems(const JsonValue& config, const ModelConfig& model) {
  Problems problems;
  const std::int64_t key_value_heads = integer(config, "num_key_value_heads").value_or(model.heads);
  const std::int64_t trained = integer(config, "training_sequence_length").value_or(0);
  const auto refuse_unless = [&problems](bool holds, const char* text) {
    if (!holds) problems.emplace_back(text);
  };
  refuse_unless(model.hidden % model.heads == 0, "hidden_size is not a multiple of num_attention_heads");
  refuse_unless(model.head_dim % 2 == 0, "head_dim must be even for rotary embedding");
  refuse_unless(model.head_dim == model.hidden / model.heads, "head_dim x num_attention_heads is not hidden_size");
  refuse_unless(key_value_heads == model.heads, "num_key_value_heads different from num_attention_heads");
  refuse_unless(model.tokenizer != "byte" || model.vocab >= kByteVocabulary,
                "the byte tokenizer needs a vocab_size of at least 256");
  refuse_unless(trained <= model.max_position_embeddings,
                "training_sequence_length is above max_position_embeddings");
  return problems;
}

}  // namespace

ModelConfig model_config_from_json(const JsonValue& config) {
  Problems problems = rule_problems("it", config, key_rules(), Unknown::refused);
  const JsonValue* type = config.find("model_type");
  const bool recurrent = type != nullptr && type->is_string() && type->string() == kRecurrent;
  if (recurrent) check_rules(problems, "it", config, recurrent_rules());
  ModelConfig model;
  if (problems.empty()) {
    model.recurrent = recurrent;
    model.vocab = *integer(config, "vocab_size");
    model.hidden = *integer(config, "hidden_size");
    model.layers = *integer(config, "num_hidden_layers");
    model.heads = *integer(config, "num_attention_heads");
    model.head_dim = integer(config, "head_dim").value_or(model.hidden / model.heads);
    model.max_position_embeddings = *integer(config, "max_position_embeddings");
    model.rope_theta = config.at("rope_theta").number();
    model.rope_interleaved = config.at("rope_layout").string() == "interleaved";
    model.sliding_window = integer(config, "sliding_window");
    model.tokenizer = config.at("tokenizer").string();
    problems = relation_problems(config, model);
    if (!token_ids(config, "bos_token_id", model.vocab, problems).empty()) {
      model.bos_token_id = integer(config, "bos_token_id");
    }
    model.eos_token_ids = token_ids(config, "eos_token_id", model.vocab, problems);
  }
  refuse_problems(ErrorKind::bundle, "the manifest's config is unusable", problems);
  return model;
}

}  // namespace crt
