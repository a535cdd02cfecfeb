#include "bundle/model_config.hpp"

#include <algorithm>
#include <array>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "bundle/message_text.hpp"
#include "bundle/problem_list.hpp"
#include "crt_runtime/error.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;
using Choices = std::vector<std::string>;

constexpr std::string_view kRecurrent = "context_ready_transformer";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::int64_t kByteVocabulary = 256;

enum class Kind { integer, optional_integer, optional_integers, number, boolean, choice };

/// One key of config.json and the range of its values.
struct Key {
  const char* name;
  Kind kind;
  bool required = false;
  bool positive = false;
  std::int64_t most = 0;  // 0: no limit
};
constexpr std::int64_t kMostPositions = std::int64_t{1} << 20U;
constexpr std::int64_t kMostLayers = 4096;
// In alphabetical order: it is the order in which known keys are listed.
constexpr std::array<Key, 21> kKeys{{
    {"bos_token_id", Kind::optional_integer},
    {"correction_intermediate_size", Kind::optional_integer},
    {"eos_token_id", Kind::optional_integers},
    {"format_version", Kind::integer},
    {"head_dim", Kind::integer, false, true},
    {"hidden_size", Kind::integer, true, true},
    {"intermediate_size", Kind::integer, true, true},
    {"layer_norm_eps", Kind::number, true, true},
    {"max_position_embeddings", Kind::integer, true, true, kMostPositions},
    {"model_type", Kind::choice, true},
    {"num_attention_heads", Kind::integer, true, true},
    {"num_hidden_layers", Kind::integer, true, true, kMostLayers},
    {"num_key_value_heads", Kind::integer, false, true},
    {"rope_layout", Kind::choice, true},
    {"rope_theta", Kind::number, true, true},
    {"sliding_window", Kind::optional_integer, false, true},
    {"tie_word_embeddings", Kind::boolean, true},
    {"tokenizer", Kind::choice, true},
    {"training_sequence_length", Kind::optional_integer, false, true},
    {"unroll_steps", Kind::integer, false, true, kMostLayers},
    {"vocab_size", Kind::integer, true, true},
}};

const Key* find_key(std::string_view name) {
  const auto found = std::find_if(kKeys.begin(), kKeys.end(), [name](const Key& key) { return key.name == name; });
  return found == kKeys.end() ? nullptr : &*found;
}

Choices choices_of(std::string_view name) {
  if (name == "model_type") return {std::string(kRecurrent), "transformer"};
  if (name == "rope_layout") return {"interleaved", "half"};
  return {"byte", "tokenizer.json", "none"};
}

bool is_derived(std::string_view name) { return name == "head_dim" || name == "num_key_value_heads"; }

std::string brief(const JsonValue& value) {
  const std::string text = shown(value, 240);
  return first_characters(text, 60) == text ? text : first_characters(text, 57) + "...";
}

bool is_one_of(const JsonValue& value, const Choices& choices) {
  return value.is_string() && std::find(choices.begin(), choices.end(), value.string()) != choices.end();
}

bool is_integers(const JsonValue& value) {
  const auto is_integer = [](const JsonValue& item) { return item.is_integer(); };
  return value.is_array() && !value.array().empty() &&
         std::all_of(value.array().begin(), value.array().end(), is_integer);
}

std::string type_problem(const Key& key, const JsonValue& value) {
  const std::string must = std::string(key.name) + " must be ", found = ", found " + brief(value);
  switch (key.kind) {
    case Kind::integer:
      return value.is_integer() ? "" : must + "an integer" + found;
    case Kind::optional_integer:
      return value.is_integer() || value.is_null() ? "" : must + "an integer" + found;
    case Kind::optional_integers:
      return value.is_integer() || value.is_null() || is_integers(value)
                 ? ""
                 : must + "an integer or a list of at least one" + found;
    case Kind::number:
      return value.is_number() ? "" : must + "a finite number" + found;
    case Kind::boolean:
      return value.is_boolean() ? "" : must + "true or false" + found;
    case Kind::choice:
      break;
  }
  const Choices choices = choices_of(key.name);
  return is_one_of(value, choices) ? "" : must + "one of " + joined(choices) + found;
}

/// The values of the right type; what is missing, null or of the wrong type is not judged further.
class SoundValues {
 public:
  explicit SoundValues(const JsonValue& config) : config_(config) {}

  const JsonValue* find(std::string_view name) const {
    const Key* key = find_key(name);
    const JsonValue* value = config_.find(name);
    const bool absent = value == nullptr || value->is_null() || !type_problem(*key, *value).empty();
    return absent ? nullptr : value;
  }
  std::optional<std::int64_t> integer(std::string_view name) const {
    const JsonValue* value = find(name);
    return value == nullptr ? std::nullopt : std::optional(value->integer());
  }
  /// One integer or a list of them; empty where there is none.
  std::vector<std::int64_t> integers(std::string_view name) const {
    const JsonValue* value = find(name);
    if (value == nullptr) return {};
    if (value->is_integer()) return {value->integer()};
    std::vector<std::int64_t> found;
    for (const JsonValue& item : value->array()) found.push_back(item.integer());
    return found;
  }
  bool is(std::string_view name, std::string_view text) const {
    const JsonValue* value = find(name);
    return value != nullptr && value->string() == text;
  }

 private:
  const JsonValue& config_;
};

Problems key_problems(const JsonValue& config) {
  Problems problems;
  Choices known;
  for (const Key& key : kKeys) known.emplace_back(key.name);
  for (const JsonMember& member : config.object().members()) {
    if (find_key(member.first) == nullptr) {
      problems.push_back("unknown key " + in_quotes(member.first) + "; known keys: " + joined(known));
    }
  }
  const JsonValue* type = config.find("model_type");
  const bool recurrent = type != nullptr && type->is_string() && type->string() == kRecurrent;
  for (const Key& key : kKeys) {
    const std::string_view name = key.name;
    const bool required =
        key.required || (recurrent && (name == "correction_intermediate_size" || name == "unroll_steps"));
    if (required && config.find(name) == nullptr) problems.push_back("missing key " + in_quotes(name));
  }
  for (const char* name : {"head_dim", "num_key_value_heads"}) {
    const JsonValue* value = config.find(name);
    if (value != nullptr && value->is_integer() && value->integer() == 0) {
      problems.push_back(std::string(name) + " must be at least 1, found 0");
    }
  }
  return problems;
}

void append_type_problems(Problems& problems, const JsonValue& config) {
  for (const JsonMember& member : config.object().members()) {
    const Key* key = find_key(member.first);
    if (key == nullptr || (is_derived(member.first) && member.second.is_null())) continue;
    std::string problem = type_problem(*key, member.second);
    if (!problem.empty()) problems.push_back(std::move(problem));
  }
}

void append_range_problems(Problems& problems, const SoundValues& values) {
  for (const Key& key : kKeys) {
    const std::string_view name = key.name;
    const JsonValue* value = key.positive ? values.find(name) : nullptr;
    if (value == nullptr || (is_derived(name) && value->integer() == 0)) continue;
    if (name == "vocab_size" && value->integer() < 2) {  // one token leaves nothing to predict
      problems.push_back(std::string(name) + " must be at least 2, found " + brief(*value));
    } else if (value->number() <= 0) {
      problems.push_back(std::string(name) + " must be greater than 0, found " + brief(*value));
    } else if (key.most != 0 && value->integer() > key.most) {
      problems.push_back(std::string(name) + " must be at most " + std::to_string(key.most) +
                         " in this version, found " + brief(*value));
    }
  }
}

void append_correction_problem(Problems& problems, const SoundValues& values, const JsonValue& config) {
  const std::string name = "correction_intermediate_size";
  const JsonValue* size = config.find(name);
  if (!values.is("model_type", kRecurrent) || size == nullptr) return;
  if (size->is_null() || (size->is_integer() && size->integer() <= 0)) {
    problems.push_back(name + " must be greater than 0, found " + brief(*size));
  }
}

void append_head_problems(Problems& problems, const SoundValues& values) {
  const std::int64_t hidden = values.integer("hidden_size").value_or(0);
  const std::int64_t heads = values.integer("num_attention_heads").value_or(0);
  const std::int64_t head_dim = values.integer("head_dim").value_or(0);
  const std::int64_t derived = heads > 0 ? hidden / heads : 0;
  if (heads > 0 && hidden % heads != 0) {
    problems.push_back("hidden_size " + std::to_string(hidden) + " is not a multiple of num_attention_heads " +
                       std::to_string(heads));
  } else if ((head_dim != 0 ? head_dim : derived) % 2 != 0) {
    problems.push_back("head_dim must be even for rotary embedding, found " +
                       std::to_string(head_dim != 0 ? head_dim : derived));
  }
}

void append_relation_problems(Problems& problems, const SoundValues& values) {
  append_head_problems(problems, values);
  const std::optional<std::int64_t> vocabulary = values.integer("vocab_size");
  for (const char* name : {"bos_token_id", "eos_token_id"}) {
    for (const std::int64_t token : values.integers(name)) {
      if (!vocabulary || (token >= 0 && token < *vocabulary)) continue;
      problems.push_back(std::string(name) + " must be in [0, vocab_size = " + std::to_string(*vocabulary) +
                         "), found " + std::to_string(token));
    }
  }
  if (values.is("tokenizer", "byte") && vocabulary && *vocabulary < kByteVocabulary) {
    problems.push_back("the byte tokenizer needs vocab_size >= " + std::to_string(kByteVocabulary) + ", found " +
                       std::to_string(*vocabulary));
  }
  const std::optional<std::int64_t> trained = values.integer("training_sequence_length");
  const std::optional<std::int64_t> positions = values.integer("max_position_embeddings");
  if (trained && positions && *trained > *positions) {
    problems.push_back("training_sequence_length " + std::to_string(*trained) + " is above max_position_embeddings " +
                       std::to_string(*positions));
  }
}

Problems unsupported_problems(const SoundValues& values, std::int64_t hidden, std::int64_t heads,
                              std::int64_t head_dim) {
  Problems problems;
  const std::int64_t version = values.integer("format_version").value_or(kFormatVersion);
  if (version != kFormatVersion) {
    problems.push_back("format_version " + std::to_string(version) + " (this version reads " +
                       std::to_string(kFormatVersion) + "; upgrade crt-export)");
  }
  const std::int64_t key_value_heads = values.integer("num_key_value_heads").value_or(heads);
  if (key_value_heads != heads) {
    problems.push_back("num_key_value_heads " + std::to_string(key_value_heads) +
                       " different from num_attention_heads (grouped queries)");
  }
  if (head_dim != hidden / heads) {  // heads divides hidden; head_dim * heads may overflow
    problems.push_back("head_dim " + std::to_string(head_dim) + " x " + std::to_string(heads) +
                       " heads different from hidden_size");
  }
  return problems;
}

}  // namespace

ModelConfig model_config_from_json(const JsonValue& config) {
  const SoundValues values(config);
  Problems problems = key_problems(config);
  append_type_problems(problems, config);
  append_range_problems(problems, values);
  append_correction_problem(problems, values, config);
  append_relation_problems(problems, values);
  if (!problems.empty()) throw Error(ErrorKind::bundle, problem_list("config.json", problems));
  ModelConfig result;
  result.recurrent = values.is("model_type", kRecurrent);
  result.vocab = *values.integer("vocab_size");
  result.hidden = *values.integer("hidden_size");
  result.layers = *values.integer("num_hidden_layers");
  result.heads = *values.integer("num_attention_heads");
  result.head_dim = values.integer("head_dim").value_or(result.hidden / result.heads);
  result.max_position_embeddings = *values.integer("max_position_embeddings");
  result.rope_theta = values.find("rope_theta")->number();
  result.rope_interleaved = values.is("rope_layout", "interleaved");
  result.sliding_window = values.integer("sliding_window");
  result.bos_token_id = values.integer("bos_token_id");
  result.eos_token_ids = values.integers("eos_token_id");
  result.tokenizer = values.find("tokenizer")->string();
  problems = unsupported_problems(values, result.hidden, result.heads, result.head_dim);
  if (!problems.empty()) {
    throw Error(ErrorKind::unsupported, problem_list("config.json asks for what this version cannot do", problems));
  }
  return result;
}

}  // namespace crt
