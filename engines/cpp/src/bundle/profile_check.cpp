#include "bundle/profile_check.hpp"

#include <algorithm>
#include <optional>

#include "bundle/message_text.hpp"
#include "bundle/paths.hpp"

namespace crt {
namespace {

using Texts = std::vector<std::string>;

constexpr std::size_t kShown = 200;
constexpr std::size_t kMostNameCharacters = 64;
constexpr std::size_t kMostNames = 64;

const Texts kKeys{"name",     "title",   "runtime", "device",         "precision", "compute_capability",
                  "capacity", "batch",   "seq",     "residual_dtype", "unroll",    "prefill",
                  "attention", "threads", "options"};
const Texts kRequiredKeys{"name", "title", "runtime", "device", "precision", "capacity", "batch", "seq"};
const Texts kRuntimes{"onnxruntime", "tensorrt", "tensorrt-rtx"};
const Texts kDevices{"cpu", "cuda"};
const Texts kPrecisions{"fp32", "fp16", "w8", "w8a8"};
const Texts kAttentionForms{"auto", "fused", "decomposed"};
const Texts kResidualDtypes{"float16", "float32"};
const Texts kPrefillMethods{"auto", "steps", "passes", "adaptive"};
const Texts kLevels{"disable", "basic", "extended", "all"};

bool holds(const Texts& texts, const std::string& text) {
  return std::find(texts.begin(), texts.end(), text) != texts.end();
}

bool is_count(const JsonValue& value, std::int64_t least) { return value.is_integer() && value.integer() >= least; }

/// ONNX Runtime takes the names joined by semicolons, in a short text.
bool is_optimizer_name(const JsonValue& name) {
  constexpr const char* letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_";
  return name.is_string() && !name.string().empty() && name.string().size() <= kMostNameCharacters &&
         name.string().find_first_not_of(letters) == std::string::npos;
}

std::string unknown_key(const std::string& shown_key, const std::string& key, const Texts& known) {
  const std::optional<std::string> near = close_match(key, known);
  return "unknown key " + shown_key + (near ? " (did you mean " + in_quotes(*near) + "?)" : "");
}

/// Judges one profile; each rule looks at the values that are there and lists what it finds.
class ProfileCheck {
 public:
  explicit ProfileCheck(const JsonValue& profile)
      : profile_(profile), runtime_(text("runtime")), device_(text("device")), precision_(text("precision")) {}

  Texts problems() {
    check_keys();
    check_name_and_title();
    check_choice("runtime", kRuntimes);
    check_choice("device", kDevices);
    check_choice("precision", kPrecisions);
    check_choice("attention", kAttentionForms);
    check_choice("residual_dtype", kResidualDtypes);
    check_choice("prefill", kPrefillMethods);
    check_sizes();
    check_pairing();
    check_capability();
    check_options();
    return std::move(problems_);
  }

 private:
  void add(std::string problem) { problems_.push_back(std::move(problem)); }

  /// A text of the profile; "" if it is absent or something else.
  std::string text(const char* key) const {
    const JsonValue* value = profile_.find(key);
    return value != nullptr && value->is_string() ? value->string() : "";
  }

  void check_keys() {
    for (const auto& [key, value] : profile_.object().members()) {
      if (!holds(kKeys, key)) add(unknown_key(in_quotes(key), key, kKeys));
    }
    for (const std::string& key : kRequiredKeys) {
      if (profile_.find(key) == nullptr) add("missing key " + in_quotes(key));
    }
  }

  void check_name_and_title() {
    constexpr const char* letters = "abcdefghijklmnopqrstuvwxyz0123456789._-";
    const std::string name = text("name");
    const bool usable = !name.empty() && name.size() <= kMostNameCharacters &&
                        name.find_first_not_of(letters) == std::string::npos &&
                        std::string_view("._-").find(name.front()) == std::string_view::npos;
    if (const JsonValue* value = profile_.find("name"); value != nullptr && !usable) {
      add("name must be lower-case letters, digits, '.', '_' or '-' (at most 64), not " + shown(*value, kShown));
    } else if (const auto problem = value == nullptr ? std::nullopt : name_problem(name)) {
      add("name " + in_quotes(name) + " " + *problem + ": files of the bundle are named after it");
    } else if (holds(kPrecisions, name)) {
      add("name " + in_quotes(name) + " is the name of a precision: graph files of the two would collide");
    }
    const std::string title = text("title");
    const bool blank = title.find_first_not_of(" \t\n\r\f\v") == std::string::npos;
    const JsonValue* value = profile_.find("title");
    if (value != nullptr && (blank || title.find('\n') != std::string::npos)) {
      add("title must be one line of text that names the hardware, not " + shown(*value, kShown));
    }
  }

  void check_choice(const char* key, const Texts& allowed) {
    const JsonValue* value = profile_.find(key);
    if (value != nullptr && !(value->is_string() && holds(allowed, value->string()))) {
      add(std::string(key) + " must be one of " + joined(allowed) + ", not " + shown(*value, kShown));
    }
  }

  void check_sizes() {
    const std::size_t before = problems_.size();
    const JsonValue* capacity = profile_.find("capacity");
    if (capacity != nullptr && !is_count(*capacity, 1)) {
      add("capacity must be at least 1 token, not " + shown(*capacity, kShown));
    }
    const JsonValue* threads = profile_.find("threads");
    if (threads != nullptr && !(is_count(*threads, 0) && threads->integer() <= kMostThreads)) {
      add("threads must be 0 (all) or more, at most " + std::to_string(kMostThreads) + ", not " +
          shown(*threads, kShown));
    }
    const JsonValue* unroll = profile_.find("unroll");
    if (unroll != nullptr && !unroll->is_null() && !is_count(*unroll, 1)) {
      add("unroll must be at least 1 pass, not " + shown(*unroll, kShown));
    }
    check_range("batch");
    check_range("seq");
    const JsonValue* seq = profile_.find("seq");
    if (problems_.size() != before || seq == nullptr || capacity == nullptr) return;
    const std::int64_t most = seq->array()[2].integer();
    if (most > capacity->integer()) {
      add("seq may not exceed the capacity of " + shown(*capacity) + " tokens, but its largest size is " +
          std::to_string(most));
    }
  }

  void check_range(const std::string& key) {
    const JsonValue* value = profile_.find(key);
    if (value == nullptr) return;
    const bool three = value->is_array() && value->array().size() == 3;
    if (!three || !std::all_of(value->array().begin(), value->array().end(),
                               [](const JsonValue& size) { return is_count(size, 1); })) {
      add(key + " must be [min, opt, max], each at least 1, not " + shown(*value, kShown));
      return;
    }
    const JsonArray& sizes = value->array();
    if (sizes[0].integer() > sizes[1].integer() || sizes[1].integer() > sizes[2].integer()) {
      add(key + " must rise from min over opt to max, not " + shown(*value, kShown));
    }
  }

  /// Which precisions the runtime can execute on the device; empty if it does not run there.
  Texts runnable_precisions() const {
    if (runtime_ == "onnxruntime") return device_ == "cpu" ? kPrecisions : Texts{"fp32", "fp16"};
    return device_ == "cuda" ? Texts{"fp16", "w8a8"} : Texts{};
  }

  void check_pairing() {
    if (holds(kRuntimes, runtime_) && holds(kDevices, device_)) {
      const Texts allowed = runnable_precisions();
      if (allowed.empty()) {
        add(runtime_ + " does not run on " + device_);
      } else if (holds(kPrecisions, precision_) && !holds(allowed, precision_)) {
        add(runtime_ + " on " + device_ + " runs " + joined(allowed) + ", not " + precision_);
      }
    }
    const bool float32_only = precision_ == "fp32" || precision_ == "w8";
    if (float32_only && profile_.find("residual_dtype") != nullptr && text("residual_dtype") != "float32") {
      add("residual_dtype must be float32 with precision " + precision_);
    }
    if (runtime_ == "onnxruntime" && (text("attention") == "fused" || text("attention") == "decomposed")) {
      add("attention is for TensorRT: ONNX Runtime runs the exported graph as it is");
    }
    const JsonValue* threads = profile_.find("threads");
    if (device_ == "cuda" && threads != nullptr && threads->is_integer() && threads->integer() != 0) {
      add("threads is for device cpu");
    }
    if (device_ == "cuda" && text("prefill") == "adaptive") {
      add("prefill = 'adaptive' is for device cpu, where a look at the residual between passes costs nothing");
    }
  }

  void check_capability() {
    if (!holds(kRuntimes, runtime_)) return;
    const JsonValue none;
    const JsonValue* given = profile_.find("compute_capability");
    const JsonValue& capability = given == nullptr ? none : *given;
    if (runtime_ == "onnxruntime") {
      if (!capability.is_null()) add("compute_capability is for TensorRT, not for " + runtime_);
      return;
    }
    using Versions = std::vector<std::int64_t>;  // SM versions that the builder accepts as a target
    const Versions versions = runtime_ == "tensorrt" ? Versions{75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121}
                                                     : Versions{75, 80, 86, 89, 120, 121};
    if (capability.is_integer() &&
        std::find(versions.begin(), versions.end(), capability.integer()) != versions.end()) {
      return;
    }
    Texts listed;
    for (const std::int64_t version : versions) listed.push_back(std::to_string(version));
    add("compute_capability of a " + runtime_ + " profile must be one of " + joined(listed) +
        " (80 is SM 8.0), not " + shown(capability, kShown));
  }

  void check_options() {
    const JsonValue* options = profile_.find("options");
    if (options == nullptr) return;
    if (!options->is_object()) {
      add("options must be a table, not " + shown(*options, kShown));
      return;
    }
    const bool compiled = runtime_ == "tensorrt" || runtime_ == "tensorrt-rtx";
    const Texts known = compiled
                            ? Texts{"optimization_level", "workspace_mib", "ampere_plus", "version_compatible"}
                            : Texts{"graph_optimization", "disabled_optimizers", "spinning", "huge_pages", "mmap"};
    for (const auto& [key, value] : options->object().members()) {
      if (!holds(known, key)) add(unknown_key("'options." + key + "'", key, known));
    }
    if (compiled) {
      check_builder_options(*options);
    } else {
      check_ort_options(*options);
    }
  }

  void check_ort_options(const JsonValue& options) {
    const JsonValue* level = options.find("graph_optimization");
    if (level != nullptr && !(level->is_string() && holds(kLevels, level->string()))) {
      add("options.graph_optimization must be one of " + joined(kLevels) + ", not " + shown(*level, kShown));
    }
    const JsonValue* names = options.find("disabled_optimizers");
    if (names != nullptr && !(names->is_array() && names->array().size() <= kMostNames &&
                              std::all_of(names->array().begin(), names->array().end(), is_optimizer_name))) {
      add("options.disabled_optimizers must be a list of names, not " + shown(*names, kShown));
    }
    for (const char* key : {"spinning", "huge_pages", "mmap"}) check_boolean_option(options, key);
  }

  void check_builder_options(const JsonValue& options) {
    const JsonValue* level = options.find("optimization_level");
    if (level != nullptr && !(is_count(*level, 0) && level->integer() <= 5)) {
      add("options.optimization_level must be 0 to 5, not " + shown(*level, kShown));
    }
    const JsonValue* workspace = options.find("workspace_mib");
    if (workspace != nullptr && !is_count(*workspace, 0)) {
      add("options.workspace_mib must be 0 or more MiB, not " + shown(*workspace, kShown));
    }
    for (const char* key : {"ampere_plus", "version_compatible"}) {
      check_boolean_option(options, key);
      const JsonValue* value = options.find(key);
      if (runtime_ == "tensorrt-rtx" && value != nullptr && value->is_boolean() && value->boolean()) {
        add("options." + std::string(key) + " does not apply to tensorrt-rtx");
      }
    }
  }

  void check_boolean_option(const JsonValue& options, const char* key) {
    const JsonValue* value = options.find(key);
    if (value != nullptr && !value->is_boolean()) {
      add("options." + std::string(key) + " must be true or false, not " + shown(*value, kShown));
    }
  }

  const JsonValue& profile_;
  std::string runtime_;
  std::string device_;
  std::string precision_;
  Texts problems_;
};

}  // namespace

std::vector<std::string> profile_problems(const JsonValue& profile) { return ProfileCheck(profile).problems(); }

}  // namespace crt
