#include "bundle/target.hpp"

#include <algorithm>
#include <utility>

#include "bundle/held_files.hpp"
#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

using Problems = std::vector<std::string>;

constexpr std::size_t kMostNameCharacters = 64;
constexpr std::size_t kMostNames = 64;
constexpr char kPrecisions[] = "fp32 fp16 w8 w8a8";

const MemberRules& profile_rules() {
  static const MemberRules rules{
      {"name", kText},
      {"title", kText},
      {"runtime", kText, 0, 0, "onnxruntime tensorrt tensorrt-rtx"},
      {"device", kText, 0, 0, "cpu cuda"},
      {"precision", kText, 0, 0, kPrecisions},
      {"compute_capability", kInteger | kNull | kOptional},
      {"capacity", kInteger, 1},
      {"batch", kList},
      {"seq", kList},
      {"residual_dtype", kText | kOptional, 0, 0, "float16 float32"},
      {"unroll", kInteger | kNull | kOptional, 1},
      {"prefill", kText | kOptional, 0, 0, "auto steps passes adaptive"},
      {"attention", kText | kOptional, 0, 0, "auto fused decomposed"},
      {"threads", kInteger | kOptional, 0, kMostThreads},
      {"options", kObject | kOptional},
  };
  return rules;
}

const MemberRules& option_rules(bool compiled) {
  static const MemberRules ort{
      {"graph_optimization", kText | kOptional, 0, 0, "disable basic extended all"},
      {"disabled_optimizers", kList | kOptional},
      {"spinning", kBoolean | kOptional},
      {"huge_pages", kBoolean | kOptional},
      {"mmap", kBoolean | kOptional},
  };
  static const MemberRules builder{
      {"optimization_level", kInteger | kOptional, 0, 5},
      {"workspace_mib", kInteger | kOptional, 0},
      {"ampere_plus", kBoolean | kOptional},
      {"version_compatible", kBoolean | kOptional},
  };
  return compiled ? builder : ort;
}

/// ONNX Runtime takes the names joined by semicolons, in a short text.
bool is_optimizer_name(const JsonValue& name) {
  constexpr const char* letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_";
  return name.is_string() && !name.string().empty() && name.string().size() <= kMostNameCharacters &&
         name.string().find_first_not_of(letters) == std::string::npos;
}

/// Files of the bundle are named after it, and after precisions.
bool is_profile_name(const std::string& name) {
  constexpr const char* letters = "abcdefghijklmnopqrstuvwxyz0123456789._-";
  return !name.empty() && name.size() <= kMostNameCharacters && name.find_first_not_of(letters) == std::string::npos &&
         std::string_view("._-").find(name.front()) == std::string_view::npos && !name_problem(name) &&
         !is_word(kPrecisions, name);
}

/// [min, opt, max], each at least 1.
bool is_range(const JsonArray& sizes) {
  const auto is_count = [](const JsonValue& size) { return size.is_integer() && size.integer() >= 1; };
  return sizes.size() == 3 && std::all_of(sizes.begin(), sizes.end(), is_count) &&
         sizes[0].integer() <= sizes[1].integer() && sizes[1].integer() <= sizes[2].integer();
}

/// Precisions that a runtime executes on a device; "" where it does not run there.
const char* runnable_precisions(bool compiled, bool cuda) {
  if (compiled) return cuda ? "fp16 w8a8" : "";
  return cuda ? "fp32 fp16" : kPrecisions;
}

/// Whether it is an SM version that the runtime's builder compiles for; none is for a runtime that compiles nothing.
bool is_capability(const std::string& runtime, const JsonValue* capability) {
  if (runtime == "onnxruntime") return capability == nullptr;
  const char* versions =
      runtime == "tensorrt" ? "75 80 86 87 89 90 100 103 110 120 121" : "75 80 86 89 120 121";
  return capability != nullptr && is_word(versions, std::to_string(capability->integer()));
}

/// What no rule about one key can say of a profile whose keys are valid.
Problems relation_problems(const JsonValue& profile) {
  const auto text = [&](const char* key) { return given(profile, key) == nullptr ? "" : profile.at(key).string(); };
  const auto option = [&](const char* key) {
    const JsonValue* options = given(profile, "options");
    return options == nullptr ? nullptr : options->find(key);
  };
  const auto chosen = [&](const char* key) { return option(key) != nullptr && option(key)->boolean(); };
  const std::string runtime = text("runtime"), precision = text("precision"), title = text("title");
  const bool compiled = runtime != "onnxruntime", cuda = text("device") == "cuda";
  Problems problems;
  const auto refuse_if = [&problems](bool broken, const std::string& problem) {
    if (broken) problems.push_back(problem);
  };
  refuse_if(!is_profile_name(text("name")), "name " + in_quotes(text("name")) + " cannot name files of a bundle");
  refuse_if(title.find_first_not_of(" \t\n\r\f\v") == std::string::npos || title.find('\n') != std::string::npos,
            "title must be one line of text");
  for (const char* key : {"batch", "seq"}) {
    refuse_if(!is_range(profile.at(key).array()),
              std::string(key) + " must be [min, opt, max], rising and each at least 1");
  }
  if (!problems.empty()) return problems;
  refuse_if(profile.at("seq").array()[2].integer() > profile.at("capacity").integer(), "seq exceeds the capacity");
  refuse_if(!is_word(runnable_precisions(compiled, cuda), precision),
            runtime + " on " + text("device") + " does not run " + precision);
  refuse_if((precision == "fp32" || precision == "w8") && text("residual_dtype") == "float16",
            "residual_dtype must be float32 with precision " + precision);
  refuse_if(!compiled && is_word("fused decomposed", text("attention")), "attention is for TensorRT");
  refuse_if(cuda && given(profile, "threads") != nullptr && profile.at("threads").integer() != 0,
            "threads is for device cpu");
  refuse_if(cuda && text("prefill") == "adaptive", "prefill = 'adaptive' is for device cpu");
  refuse_if(!is_capability(runtime, given(profile, "compute_capability")),
            "compute_capability is none that " + runtime + " has");
  refuse_if(runtime == "tensorrt-rtx" && (chosen("ampere_plus") || chosen("version_compatible")),
            "ampere_plus and version_compatible do not apply to tensorrt-rtx");
  const JsonValue* names = option("disabled_optimizers");
  refuse_if(names != nullptr && (names->array().size() > kMostNames ||
                                 !std::all_of(names->array().begin(), names->array().end(), is_optimizer_name)),
            "options.disabled_optimizers must be a list of names");
  return problems;
}

std::map<std::string, std::string> files_of(const JsonValue& references) {
  std::map<std::string, std::string> files;
  for (const auto& [graph, file] : references.object().members()) files[graph] = file.string();
  return files;
}

std::optional<std::int64_t> optional_integer(const JsonValue& object, const char* name) {
  const JsonValue* value = given(object, name);
  return value == nullptr ? std::nullopt : std::optional(value->integer());
}

OrtProfile ort_profile(const JsonValue* options) {
  OrtProfile profile;
  if (options == nullptr) return profile;
  if (const JsonValue* level = options->find("graph_optimization")) profile.graph_optimization = level->string();
  if (const JsonValue* spinning = options->find("spinning")) profile.spinning = spinning->boolean();
  if (const JsonValue* huge = options->find("huge_pages")) profile.huge_pages = huge->boolean();
  if (const JsonValue* mapped = options->find("mmap")) profile.mmap = mapped->boolean();
  if (const JsonValue* names = options->find("disabled_optimizers")) {
    for (const JsonValue& name : names->array()) profile.disabled_optimizers.push_back(name.string());
  }
  return profile;
}

PrefillPlan prefill_plan(const JsonValue& entry, bool iterated) {
  PrefillPlan plan;
  if (!iterated) return plan;
  const JsonValue& given_plan = entry.at("prefill");
  const std::string& method = given_plan.at("method").string();
  if (method == "steps") plan.method = PrefillMethod::steps;
  if (method == "adaptive") plan.method = PrefillMethod::adaptive;
  plan.chunk = optional_integer(given_plan, "chunk");
  plan.shortest = given_plan.at("shortest").integer();
  plan.passes = given_plan.at("passes").integer();
  if (const JsonValue* bound = given(given_plan, "residual_bound")) plan.residual_bound = bound->number();
  if (plan.method == PrefillMethod::passes && plan.passes == optional_integer(entry, "unroll")) {
    plan.passes = std::nullopt;  // which the unrolled graph makes in one call
  }
  return plan;
}

}  // namespace

std::vector<std::string> profile_problems(const JsonValue& profile) {
  Problems problems = rule_problems("it", profile, profile_rules(), Unknown::refused);
  if (!problems.empty()) return problems;
  if (const JsonValue* options = given(profile, "options")) {
    problems = rule_problems("options", *options, option_rules(profile.at("runtime").string() != "onnxruntime"),
                             Unknown::refused);
  }
  return problems.empty() ? relation_problems(profile) : problems;
}

Target target_from_json(const std::string& name, const JsonValue& entry, const ModelConfig& config,
                        const std::string& source) {
  const JsonValue& profile = entry.at("profile");
  const Problems problems = profile_problems(profile);
  refuse_problems(ErrorKind::bundle, "engine profile " + source, problems);
  Target target;
  target.name = name;
  target.runtime = profile.at("runtime").string();
  target.device = profile.at("device").string();
  target.precision = profile.at("precision").string();
  target.graphs = files_of(entry.at("graphs"));
  target.engines = files_of(entry.at("engines"));
  target.capacity = std::min(entry.at("capacity").integer(), config.max_position_embeddings);
  target.unroll = optional_integer(entry, "unroll");
  target.cache_dtype = entry.at("cache_dtype").string() == "float16" ? DType::float16 : DType::float32;
  target.max_tokens = profile.at("seq").array()[2].integer();
  target.max_batch = profile.at("batch").array()[2].integer();
  target.threads = static_cast<int>(optional_integer(profile, "threads").value_or(0));
  if (const auto capability = optional_integer(profile, "compute_capability")) {
    target.compute_capability = static_cast<int>(*capability);
  }
  target.prefill = prefill_plan(entry, config.iterated);
  if (target.runtime == "onnxruntime") target.ort = ort_profile(given(profile, "options"));
  return target;
}

}  // namespace crt
