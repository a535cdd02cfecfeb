#include "bundle/sidecar.hpp"

#include <algorithm>
#include <utility>

#include "bundle/json.hpp"
#include "bundle/message_text.hpp"
#include "bundle/problem_list.hpp"
#include "crt_runtime/error.hpp"

namespace crt {
namespace {

constexpr std::size_t kMostDims = 8;
constexpr char kAgain[] = "build the bundle again";

/// Reads the fields that a runtime needs and lists what is wrong with them.
class SidecarReader {
 public:
  explicit SidecarReader(const JsonValue& values) : values_(values) {}

  EngineSidecar read() {
    EngineSidecar sidecar;
    sidecar.graph = text("graph");
    sidecar.runtime = text("runtime");
    sidecar.runtime_version = text("runtime_version");
    sidecar.capacity = count("capacity");
    sidecar.compute_capability = capability();
    sidecar.ampere_plus = option("ampere_plus");
    sidecar.version_compatible = find_option("version_compatible") != nullptr && option("version_compatible");
    read_inputs(sidecar);
    return sidecar;
  }
  const std::vector<std::string>& problems() const noexcept { return problems_; }

 private:
  std::string text(const char* key) {
    const JsonValue* value = values_.find(key);
    if (value != nullptr && value->is_string() && !value->string().empty()) return value->string();
    must(key, "a text", value);
    return "";
  }
  std::int64_t count(const char* key) {
    const JsonValue* value = values_.find(key);
    if (value != nullptr && value->is_integer() && value->integer() >= 1) return value->integer();
    must(key, "an integer of 1 or more", value);
    return 0;
  }
  std::optional<int> capability() {
    constexpr std::int64_t most = 999;
    const JsonValue* value = values_.find("compute_capability");
    if (value != nullptr && value->is_null()) return std::nullopt;
    if (value != nullptr && value->is_integer() && value->integer() >= 1 && value->integer() <= most) {
      return static_cast<int>(value->integer());
    }
    must("compute_capability", "an SM version times ten or null", value);
    return std::nullopt;
  }
  const JsonValue* find_option(const char* name) const {
    const JsonValue* options = values_.find("options");
    return options == nullptr ? nullptr : options->find(name);
  }
  bool option(const char* name) {
    const JsonValue* value = find_option(name);
    if (value != nullptr && value->is_boolean()) return value->boolean();
    must(std::string("options.") + name, "true or false", value);
    return false;
  }
  void read_inputs(EngineSidecar& sidecar) {
    const JsonValue* inputs = values_.find("inputs");
    if (inputs == nullptr || !inputs->is_array()) {
      must("inputs", "a list", inputs);
      return;
    }
    for (std::size_t i = 0; i < inputs->array().size(); ++i) read_input(inputs->array()[i], i, sidecar);
  }
  void read_input(const JsonValue& input, std::size_t index, EngineSidecar& sidecar) {
    const std::string where = "inputs[" + std::to_string(index) + "]";
    const JsonValue* name = input.find("name");
    if (name == nullptr || !name->is_string()) {
      must(where + ".name", "a text", name);
      return;
    }
    const std::array<const char*, 3> keys{"min", "opt", "max"};
    std::array<Shape, 3> shapes;
    for (std::size_t i = 0; i < keys.size(); ++i) shapes[i] = shape(where + "." + keys[i], input.find(keys[i]));
    const bool same_rank = shapes[0].size() == shapes[1].size() && shapes[1].size() == shapes[2].size();
    if (!same_rank) problems_.push_back(where + ": min, opt and max have different numbers of dims");
    if (!sidecar.input_shapes.emplace(name->string(), std::move(shapes)).second) {
      problems_.push_back(where + ": the name " + in_quotes(name->string()) + " stands twice");
    }
  }
  Shape shape(const std::string& where, const JsonValue* value) {
    const auto is_size = [](const JsonValue& size) { return size.is_integer() && size.integer() >= 1; };
    Shape result;
    if (value == nullptr || !value->is_array() || value->array().size() > kMostDims ||
        !std::all_of(value->array().begin(), value->array().end(), is_size)) {
      must(where, "a list of sizes", value);
      return result;
    }
    for (const JsonValue& size : value->array()) result.push_back(size.integer());
    return result;
  }
  void must(const std::string& key, const std::string& what, const JsonValue* found) {
    problems_.push_back(key + " must be " + what + ", found " + (found == nullptr ? "nothing" : shown(*found)));
  }

  const JsonValue& values_;
  std::vector<std::string> problems_;
};

}  // namespace

EngineSidecar sidecar_from_json(const std::string& content, const std::string& source) {
  std::optional<JsonValue> values;
  try {
    values = parse_json(content);
  } catch (const JsonError& error) {
    throw Error(ErrorKind::bundle, source + " " + error.what() + "; " + kAgain);
  }
  SidecarReader reader(*values);
  EngineSidecar sidecar = reader.read();
  if (!reader.problems().empty()) {
    throw Error(ErrorKind::bundle,
                problem_list(source + " is no sidecar of an engine (" + kAgain + ")", reader.problems()));
  }
  return sidecar;
}

}  // namespace crt
