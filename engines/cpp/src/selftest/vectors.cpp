#include "selftest/vectors.hpp"

#include <algorithm>
#include <cstring>
#include <optional>

#include "bundle/held_files.hpp"
#include "bundle/json.hpp"
#include "crt_runtime/error.hpp"
#include "engine/tensor_names.hpp"
#include "session/caches.hpp"
#include "session/floats.hpp"
#include "session/snapshot.hpp"
#include "session/tensor_file.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

constexpr char kNextTokens[] = ".next_tokens";
constexpr char kDivisors[] = "value_divisors.";
constexpr std::int64_t kMostDigits = 9;

const TensorFileKind& vectors_kind() {
  static const TensorFileKind kind{
      "crt-export selftest vectors",
      1,
      "a file of self-test vectors",
      {"generator", "torch", "checkpoint", "ids", "seed", "prompt", "steps", "logit_stride", "limits"}};
  return kind;
}

/// A whole number of the metadata; adds a problem if it is none.
std::int64_t count_of(const std::map<std::string, std::string>& metadata, const char* key, std::int64_t least,
                      std::vector<std::string>* problems) {
  const std::string& text = metadata.at(key);
  const bool digits = !text.empty() && text.size() <= static_cast<std::size_t>(kMostDigits) &&
                      text.find_first_not_of("0123456789") == std::string::npos;
  const std::int64_t number = digits ? std::stoll(text) : least - 1;
  if (number < least) {
    problems->push_back(std::string("metadata ") + key + " must be a whole number of at least " +
                        std::to_string(least) + ", found " + in_quotes(text, 80));
  }
  return number;
}

/// Limits by precision; unset where they are no JSON object of numbers above 0.
std::optional<std::map<std::string, double>> limits_of(const std::string& text) {
  std::map<std::string, double> limits;
  try {
    const JsonValue parsed = parse_json(text);
    if (!parsed.is_object()) return std::nullopt;
    for (const auto& [precision, value] : parsed.object().members()) {
      if (!value.is_number() || !(value.number() > 0)) return std::nullopt;
      limits[precision] = value.number();
    }
  } catch (const JsonError&) {
    return std::nullopt;
  }
  return limits;
}

[[noreturn]] void refuse(const std::string& path, const std::vector<std::string>& problems) {
  throw Error(ErrorKind::bundle,
              problem_list("the self-test vectors " + path + " cannot be used; build the bundle again", problems));
}

}  // namespace

std::string prefill_run(std::int64_t unroll, std::int64_t chunk) {
  return "prefill.k" + std::to_string(unroll) + ".chunk" + std::to_string(chunk);
}

std::string divisor_name(const std::string& precision, std::size_t cache) {
  return kDivisors + precision + "." + std::to_string(cache);
}

bool SelftestVectors::has_run(const std::string& run) const noexcept {
  return std::find(runs_.begin(), runs_.end(), run) != runs_.end();
}

SelftestVectors SelftestVectors::load(const HeldFile& held, const ModelConfig& config, const std::string& checkpoint) {
  const std::string& path = held.path;
  SelftestVectors vectors;
  std::vector<std::string> problems;
  try {
    const TensorFile file = read_tensor_file(vectors_kind(), path, held.file);
    if (!held.unchanged()) problems.emplace_back("the file changed while it was read");
    vectors.take_metadata(file.metadata, checkpoint, &problems);
    if (problems.empty()) vectors.check_shapes(file.tensors, config, &problems);
    if (problems.empty()) vectors.take_values(file.tensors, config, &problems);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "cannot read the self-test vectors " + path + ": " + error.what());
  }
  if (!problems.empty()) refuse(path, problems);
  return vectors;
}

void SelftestVectors::take_metadata(const std::map<std::string, std::string>& metadata, const std::string& checkpoint,
                                    std::vector<std::string>* problems) {
  if (metadata.at("checkpoint") != checkpoint) {
    problems->push_back("they were made of the checkpoint " + first_characters(metadata.at("checkpoint"), 16) +
                        ", the bundle of " + first_characters(checkpoint, 16) + " (content hashes)");
  }
  prompt_ = count_of(metadata, "prompt", 1, problems);
  steps_ = count_of(metadata, "steps", 0, problems);
  stride_ = count_of(metadata, "logit_stride", 1, problems);
  const std::optional<std::map<std::string, double>> limits = limits_of(metadata.at("limits"));
  if (limits) {
    limits_ = *limits;
  } else {
    problems->push_back("metadata limits must be a JSON object of numbers above 0, found " +
                        in_quotes(metadata.at("limits"), 80));
  }
}

std::map<std::string, SelftestVectors::Expected> SelftestVectors::expected(
    const ModelConfig& config, const std::map<std::string, const SnapshotTensor*>& found) const {
  const std::int64_t tokens = prompt_ + steps_;
  std::map<std::string, Expected> expected{{"input_ids", {"I64", {tokens}}}};
  for (const auto& limit : limits_) {
    if (found.count(divisor_name(limit.first, 0)) == 0) continue;
    for (std::size_t cache = 0; cache < config.caches.size(); ++cache) {
      expected[divisor_name(limit.first, cache)] = {"F32", {config.caches[cache].heads, config.caches[cache].head_dim}};
    }
  }
  for (const std::string& run : runs_) {
    for (std::int64_t index = 0; index <= steps_; ++index) {
      const std::int64_t left = std::max<std::int64_t>(0, config.vocab - first_column(index));
      const std::int64_t stride = column_stride(index);
      expected[run + ".logits." + std::to_string(index)] = {"F32", {(left + stride - 1) / stride}};
    }
    for (const StateSpec& state : config.states) {
      Shape shape = state.shape;
      shape.insert(shape.begin(), steps_ + 1);
      expected[run + "." + names::state(state.name)] = {"F32", shape};
    }
    expected[run + kNextTokens] = {"I64", {steps_ + 1}};
    expected[run + ".margins"] = {"F32", {steps_ + 1}};
    for (std::size_t index = 0; index < 2 * config.caches.size(); ++index) {
      const CacheSpec& spec = config.caches[index / 2];
      expected[run + "." + cache_name(index)] = {"F32", {spec.heads, tokens, spec.head_dim}};
    }
  }
  return expected;
}

void SelftestVectors::check_shapes(const std::vector<SnapshotTensor>& tensors, const ModelConfig& config,
                                   std::vector<std::string>* problems) {
  const std::string ending = kNextTokens;
  std::map<std::string, const SnapshotTensor*> found;
  for (const SnapshotTensor& tensor : tensors) {
    found[tensor.name] = &tensor;
    const std::size_t size = tensor.name.size();
    if (size > ending.size() && tensor.name.compare(size - ending.size(), ending.size(), ending) == 0) {
      runs_.push_back(tensor.name.substr(0, size - ending.size()));
    }
  }
  if (!has_run(kRecurrence)) problems->push_back(std::string("they hold no run '") + kRecurrence + "'");
  // A number of steps beyond the tensors of the file would ask for more names than memory holds.
  if (steps_ > static_cast<std::int64_t>(tensors.size())) {
    problems->push_back("metadata steps is " + std::to_string(steps_) + ", but the file has " +
                        std::to_string(tensors.size()) + " tensors");
    return;
  }
  const std::map<std::string, Expected> wanted = expected(config, found);
  for (const auto& [name, form] : wanted) {
    const auto tensor = found.find(name);
    if (tensor == found.end()) {
      problems->push_back(name + " is missing");
    } else if (tensor->second->dtype != form.dtype || tensor->second->shape != form.shape) {
      problems->push_back(name + " must be " + form_text(form.dtype, form.shape) + ", found " +
                          form_text(tensor->second->dtype, tensor->second->shape));
    }
  }
  for (const auto& entry : found) {
    if (wanted.count(entry.first) == 0) problems->push_back(entry.first + " is unknown");
  }
}

void SelftestVectors::take_values(const std::vector<SnapshotTensor>& tensors, const ModelConfig& config,
                                  std::vector<std::string>* problems) {
  for (const SnapshotTensor& tensor : tensors) {
    if (tensor.dtype == "F32") {
      std::vector<float>& values = values_[tensor.name];
      values = values_of<float>(tensor);
      if (!all_finite(values.data(), values.size())) problems->push_back(tensor.name + " is not finite");
      const bool divisors = tensor.name.compare(0, std::strlen(kDivisors), kDivisors) == 0;
      if (divisors && !std::all_of(values.begin(), values.end(), [](float value) { return value > 0; })) {
        problems->push_back(tensor.name + " must be above 0");
      }
      continue;
    }
    std::vector<std::int64_t>& numbers = numbers_[tensor.name];
    numbers = values_of<std::int64_t>(tensor);
    const auto outside = [&config](std::int64_t token) { return token < 0 || token >= config.vocab; };
    if (std::any_of(numbers.begin(), numbers.end(), outside)) {
      problems->push_back(tensor.name + " holds tokens outside the vocabulary (0 to " +
                          std::to_string(config.vocab - 1) + ")");
    }
  }
}

}  // namespace crt
