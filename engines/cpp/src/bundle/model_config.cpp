#include "bundle/model_config.hpp"

#include <algorithm>
#include <set>

#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;

/// More states, caches, or values of one of them in a token than any model has: a session's memory is counted in them.
constexpr std::size_t kMostParts = 65536;
constexpr double kMostValues = 2147483647;

const MemberRules kModelRules{
    {"architecture", kText},
    {"vocab", kInteger, 1, kMostValues},
    {"hidden", kInteger, 1, kMostValues},
    {"max_positions", kInteger, 1, kMostValues},
    {"tokenizer", kText},
    {"bos_token_id", kInteger | kNull},
    {"eos_token_ids", kList},
    {"states", kList},
    {"caches", kList},
    {"rotaries", kList},
    {"passes", kInteger, 1, kMostValues},
    {"parallel", kBoolean},
    {"iterated", kBoolean},
    {"prompt", kText},
    {"relative", kBoolean},
};
const MemberRules kStateRules{{"name", kText}, {"shape", kList}, {"dtype", kText, 0, 0, "float32"}};
const MemberRules kCacheRules{
    {"name", kText},
    {"heads", kInteger, 1, kMostValues},
    {"query_heads", kInteger, 1, kMostValues},
    {"head_dim", kInteger, 1, kMostValues},
    {"window", kInteger | kNull, 1, kMostValues},
    {"rotary", kInteger | kNull, 0},
};
const MemberRules kRotaryRules{{"layout", kText, 0, 0, "interleaved half"}, {"frequencies", kList}};

bool is_state_name(const std::string& name) {
  return !name.empty() && name.size() <= 64 && name[0] >= 'a' && name[0] <= 'z' &&
         name.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_") == std::string::npos;
}

/// Sizes of 1 or more whose product a tensor can have.
bool is_shape(const JsonArray& sizes) {
  double product = 1;
  for (const JsonValue& size : sizes) {
    if (!size.is_integer() || size.integer() < 1) return false;
    product *= size.number();
  }
  return !sizes.empty() && product <= kMostValues;
}

void check_values(Problems& problems, const JsonValue& model) {
  const auto check_token = [&](const JsonValue& token) {
    if (token.is_integer() && token.integer() >= 0 && token.integer() < model.at("vocab").integer()) return;
    problems.push_back("model: a token must be in [0, vocab = " + shown(model.at("vocab")) + "), found " +
                       shown(token));
  };
  if (given(model, "bos_token_id") != nullptr) check_token(model.at("bos_token_id"));
  for (const JsonValue& token : model.at("eos_token_ids").array()) check_token(token);
  for (const JsonValue& state : model.at("states").array()) {
    const std::string& name = state.at("name").string();
    if (!is_state_name(name)) problems.push_back("model.states: expected a plain name, found " + in_quotes(name, 80));
    if (is_shape(state.at("shape").array())) continue;
    problems.push_back("model.states: the shape of " + in_quotes(name, 80) + " must be sizes of 1 or more");
  }
  for (const JsonValue& cache : model.at("caches").array()) {
    if (cache.at("heads").number() * cache.at("head_dim").number() <= kMostValues) continue;
    problems.push_back("model.caches: " + in_quotes(cache.at("name").string(), 80) + " is larger than any model's");
  }
  for (const JsonValue& rotary : model.at("rotaries").array()) {
    const JsonArray& values = rotary.at("frequencies").array();
    if (std::all_of(values.begin(), values.end(), [](const JsonValue& value) { return value.is_number(); })) continue;
    problems.emplace_back("model.rotaries: frequencies must be numbers");
  }
}

StateSpec state_from(const JsonValue& entry) {
  StateSpec state{entry.at("name").string(), {}};
  for (const JsonValue& size : entry.at("shape").array()) state.shape.push_back(size.integer());
  return state;
}

Rotary rotary_from(const JsonValue& entry) {
  Rotary rotary{entry.at("layout").string() == "interleaved", {}};
  for (const JsonValue& value : entry.at("frequencies").array()) rotary.frequencies.push_back(value.number());
  return rotary;
}

CacheSpec cache_from(const JsonValue& entry) {
  CacheSpec cache{entry.at("name").string(), entry.at("heads").integer(), entry.at("head_dim").integer(), {}, {}};
  if (const JsonValue* window = given(entry, "window")) cache.window = window->integer();
  if (const JsonValue* rotary = given(entry, "rotary")) cache.rotary = static_cast<std::size_t>(rotary->integer());
  return cache;
}

/// What no rule about one member can say.
Problems contradictions(const ModelConfig& model, bool parallel) {
  Problems problems;
  std::set<std::string> names;
  for (const StateSpec& state : model.states) {
    if (!names.insert(state.name).second) problems.push_back("two states are called " + in_quotes(state.name));
    if (state.name == names::kHidden && state.shape != std::vector<std::int64_t>{model.hidden}) {
      problems.push_back("the state 'hidden' is what the head reads, so it has the shape [" +
                         std::to_string(model.hidden) + "]");
    }
  }
  for (const CacheSpec& cache : model.caches) {
    if (!cache.rotary) continue;
    const std::string label = "cache " + in_quotes(cache.name, 80);
    if (*cache.rotary >= model.rotaries.size()) {
      problems.push_back(label + " names rotation " + std::to_string(*cache.rotary) + " of " +
                         std::to_string(model.rotaries.size()));
    } else if (model.rotaries[*cache.rotary].frequencies.size() != static_cast<std::size_t>(cache.head_dim / 2)) {
      problems.push_back(label + " has heads of " + std::to_string(cache.head_dim) +
                         " channels, and its rotation not as many pairs");
    }
  }
  if (model.iterated != (parallel && !model.states.empty())) {
    problems.push_back(std::string("iterated is ") + (model.iterated ? "true" : "false") +
                       ", its states say otherwise");
  }
  return problems;
}

}  // namespace

std::optional<std::int64_t> ModelConfig::window() const {
  std::optional<std::int64_t> widest;
  for (const CacheSpec& cache : caches) {
    if (!relative || !cache.window) return std::nullopt;
    widest = std::max(widest.value_or(0), *cache.window);
  }
  return widest;
}

std::vector<std::string> model_problems(const JsonValue& model) {
  Problems problems = rule_problems("model", model, kModelRules);
  if (!problems.empty()) return problems;
  for (const auto& [key, rules] : {std::pair("states", kStateRules), std::pair("caches", kCacheRules),
                                   std::pair("rotaries", kRotaryRules)}) {
    const std::string where = std::string("model.") + key;
    const JsonArray& entries = model.at(key).array();
    if (entries.size() > kMostParts) {
      return {where + " holds " + std::to_string(entries.size()) + ", at most " + std::to_string(kMostParts) +
              " are possible"};
    }
    for (std::size_t i = 0; i < entries.size(); ++i) {
      check_rules(problems, where + "[" + std::to_string(i) + "]", entries[i], rules);
    }
  }
  if (problems.empty()) check_values(problems, model);
  return problems;
}

ModelConfig model_config_from_json(const JsonValue& model) {
  ModelConfig config;
  config.architecture = model.at("architecture").string();
  config.vocab = model.at("vocab").integer();
  config.hidden = model.at("hidden").integer();
  config.max_position_embeddings = model.at("max_positions").integer();
  config.tokenizer = model.at("tokenizer").string();
  if (const JsonValue* token = given(model, "bos_token_id")) config.bos_token_id = token->integer();
  for (const JsonValue& token : model.at("eos_token_ids").array()) config.eos_token_ids.push_back(token.integer());
  for (const JsonValue& entry : model.at("states").array()) config.states.push_back(state_from(entry));
  for (const JsonValue& entry : model.at("caches").array()) config.caches.push_back(cache_from(entry));
  for (const JsonValue& entry : model.at("rotaries").array()) config.rotaries.push_back(rotary_from(entry));
  config.passes = model.at("passes").integer();
  config.iterated = model.at("iterated").boolean();
  config.relative = model.at("relative").boolean();
  refuse_problems(ErrorKind::bundle, "the manifest's model is unusable",
                  contradictions(config, model.at("parallel").boolean()));
  return config;
}

}  // namespace crt
