#include "tensorrt/tensorrt_sidecar.hpp"

#include <algorithm>
#include <cstddef>
#include <locale>
#include <sstream>
#include <utility>

#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

constexpr const char* kAgain =
    "the bundle was changed after it was built; build it again or restore it from its source";

constexpr std::size_t kMostDims = 8;
constexpr std::size_t kMostSidecarBytes = std::size_t{16} << 20U;

const MemberRules kRules{
    {"graph", kText},
    {"runtime", kText},
    {"runtime_version", kText},
    {"compute_capability", kInteger | kNull, 1, 999},
    {"capacity", kInteger, 1},
    {"options", kObject},
    {"inputs", kList},
};
const MemberRules kOptionRules{{"ampere_plus", kBoolean}, {"version_compatible", kBoolean | kOptional}};
const MemberRules kInputRules{{"name", kText}, {"min", kList}, {"opt", kList}, {"max", kList}};

Shape shape_from(const std::string& where, const JsonArray& sizes, std::vector<std::string>& problems) {
  const auto is_size = [](const JsonValue& size) { return size.is_integer() && size.integer() >= 1; };
  Shape shape;
  if (sizes.size() > kMostDims || !std::all_of(sizes.begin(), sizes.end(), is_size)) {
    problems.push_back(where + " must be a list of at most " + std::to_string(kMostDims) + " sizes");
    return shape;
  }
  for (const JsonValue& size : sizes) shape.push_back(size.integer());
  return shape;
}

void take_input(const JsonValue& input, const std::string& where, EngineSidecar& sidecar,
                std::vector<std::string>& problems) {
  if (!check_rules(problems, where, input, kInputRules)) return;
  std::array<Shape, 3> shapes{shape_from(where + ".min", input.at("min").array(), problems),
                              shape_from(where + ".opt", input.at("opt").array(), problems),
                              shape_from(where + ".max", input.at("max").array(), problems)};
  if (shapes[0].size() != shapes[1].size() || shapes[1].size() != shapes[2].size()) {
    problems.push_back(where + ": min, opt and max have different numbers of dims");
  }
  const std::string& name = input.at("name").string();
  if (!sidecar.input_shapes.emplace(name, std::move(shapes)).second) {
    problems.push_back(where + ": the name " + in_quotes(name) + " stands twice");
  }
}

EngineSidecar sidecar_of(const JsonValue& values, std::vector<std::string>& problems) {
  EngineSidecar sidecar;
  if (!check_rules(problems, "it", values, kRules)) return sidecar;
  const JsonValue& options = values.at("options");
  if (!check_rules(problems, "options", options, kOptionRules)) return sidecar;
  for (const auto& [key, text] : {std::pair("graph", &sidecar.graph), std::pair("runtime", &sidecar.runtime),
                                  std::pair("runtime_version", &sidecar.runtime_version)}) {
    *text = values.at(key).string();
    if (text->empty()) problems.push_back(std::string(key) + " is empty");
  }
  sidecar.capacity = values.at("capacity").integer();
  if (const JsonValue* capability = given(values, "compute_capability")) {
    sidecar.compute_capability = static_cast<int>(capability->integer());
  }
  sidecar.ampere_plus = options.at("ampere_plus").boolean();
  const JsonValue* version_compatible = options.find("version_compatible");
  sidecar.version_compatible = version_compatible != nullptr && version_compatible->boolean();
  const JsonArray& inputs = values.at("inputs").array();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    take_input(inputs[i], "inputs[" + std::to_string(i) + "]", sidecar, problems);
  }
  return sidecar;
}

std::string product_of(const Target& target) {
  return target.runtime == "tensorrt-rtx" ? "TensorRT-RTX" : "TensorRT";
}

std::string dotted(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

std::vector<std::string> target_problems(const EngineSidecar& sidecar, const Target& target, const std::string& graph) {
  std::vector<std::string> problems;
  const auto expect = [&problems](const char* key, const std::string& wanted, const std::string& found) {
    if (wanted != found) problems.push_back(std::string(key) + " " + wanted + " expected, " + found + " found");
  };
  const auto text = [](const std::optional<int>& value) { return value ? std::to_string(*value) : "none"; };
  expect("graph", graph, sidecar.graph);
  expect("runtime", target.runtime, sidecar.runtime);
  expect("compute_capability", text(target.compute_capability), text(sidecar.compute_capability));
  if (sidecar.capacity < target.capacity) {  // a model that ends before the cache does uses the front of it
    problems.push_back("capacity " + std::to_string(target.capacity) + " expected, " +
                       std::to_string(sidecar.capacity) + " found");
  }
  return problems;
}

std::vector<int> numbers(const std::string& version) {
  std::vector<int> parts;
  std::istringstream stream(version);
  stream.imbue(std::locale::classic());  // elsewhere a dot may group thousands
  int part = 0;
  while (stream >> part) {
    parts.push_back(part);
    stream.ignore(1, '.');
  }
  return parts;
}

bool is_later(const std::string& version, const std::string& built) {
  const std::vector<int> here = numbers(version);
  const std::vector<int> there = numbers(built);
  return !here.empty() && !there.empty() && here[0] == there[0] && here >= there;
}

// An engine runs with the version that built it; a version-compatible one with later ones of the same major.
void add_version_problem(const EngineSidecar& sidecar, const Target& target, const EngineHost& host,
                         std::vector<std::string>& problems) {
  if (sidecar.runtime_version == host.version ||
      (sidecar.version_compatible && is_later(host.version, sidecar.runtime_version))) {
    return;
  }
  problems.push_back("it was built with " + product_of(target) + " " + sidecar.runtime_version + ", " + host.version +
                     " is installed: install " + sidecar.runtime_version +
                     ", or build the bundle again with the installed version");
}

void add_gpu_problem(const EngineSidecar& sidecar, const EngineHost& host, std::vector<std::string>& problems) {
  const int built = sidecar.compute_capability.value_or(host.compute_capability);
  if (host.compute_capability == built || (sidecar.ampere_plus && host.compute_capability > built)) return;
  problems.push_back("it was compiled for compute capability " + dotted(built) +
                     (sidecar.ampere_plus ? " or newer" : "") + ", the GPU is " + host.gpu + ", " +
                     dotted(host.compute_capability) + ": build for a profile with compute_capability = " +
                     std::to_string(host.compute_capability) + " (engines/README.md)");
}

const EngineTensor* find(const std::vector<EngineTensor>& tensors, const std::string& name) {
  const auto found = std::find_if(tensors.begin(), tensors.end(),
                                  [&name](const EngineTensor& tensor) { return tensor.spec.name == name; });
  return found == tensors.end() ? nullptr : &*found;
}

}  // namespace

EngineSidecar sidecar_from_json(const std::string& content, const std::string& source) {
  constexpr const char* again = "build the bundle again";
  std::vector<std::string> problems;
  EngineSidecar sidecar;
  try {
    sidecar = sidecar_of(parse_json(content), problems);
  } catch (const JsonError& error) {
    throw Error(ErrorKind::bundle, source + " " + error.what() + "; " + again);
  }
  refuse_problems(ErrorKind::bundle, source + " is no sidecar of an engine (" + again + ")", problems);
  return sidecar;
}

EngineSidecar read_sidecar(BundleFiles& files, const std::string& engine_file) {
  const std::string ending = ".engine";
  const std::size_t stem = engine_file.size() - std::min(engine_file.size(), ending.size());
  if (engine_file.substr(stem) != ending) {
    throw Error(ErrorKind::bundle, "the engine " + in_quotes(engine_file) + " of " + files.path() +
                                       " has no sidecar: its name must end in " + ending);
  }
  const std::string name = engine_file.substr(0, stem) + ".json";
  return sidecar_from_json(files.content(name, kMostSidecarBytes), files.path() + "/" + name);
}

void check_sidecar(const std::string& engine_file, const EngineSidecar& sidecar, const Target& target,
                   const std::string& graph, const EngineHost& host) {
  std::vector<std::string> problems = target_problems(sidecar, target, graph);
  if (!problems.empty()) {
    const std::string heading = "the sidecar of " + engine_file + " does not fit " + target.name;
    throw Error(ErrorKind::bundle, problem_list(heading, problems) + "\n" + kAgain);
  }
  add_version_problem(sidecar, target, host, problems);
  add_gpu_problem(sidecar, host, problems);
  refuse_problems(ErrorKind::missing_dependency, engine_file + " cannot run on this machine", problems);
}

std::vector<std::string> engine_problems(const std::vector<EngineTensor>& tensors, const EngineSidecar& sidecar,
                                         const GraphContract& contract) {
  std::vector<std::string> problems;
  for (const auto& [name, shapes] : sidecar.input_shapes) {
    const EngineTensor* tensor = find(tensors, name);
    if (tensor != nullptr && (tensor->least != shapes[0] || tensor->most != shapes[2])) {
      problems.push_back(name + " must take shapes " + list_text(shapes[0]) + " to " + list_text(shapes[2]) +
                         ", found " +
                         list_text(tensor->least) + " to " + list_text(tensor->most));
    }
  }
  for (const EngineTensor& tensor : tensors) {
    const auto pair = std::find_if(contract.aliases.begin(), contract.aliases.end(),
                                   [&](const auto& alias) { return alias.first == tensor.spec.name; });
    const std::string wanted = pair == contract.aliases.end() ? "" : pair->second;
    if (tensor.alias != wanted) {
      problems.push_back(tensor.spec.name + " must share memory with " + (wanted.empty() ? "nothing" : wanted) +
                         ", found " + (tensor.alias.empty() ? "nothing" : tensor.alias));
    }
    constexpr std::size_t kCapacityAxis = 2;
    if (!wanted.empty() && tensor.spec.dims.size() > kCapacityAxis &&
        tensor.spec.dims[kCapacityAxis] != sidecar.capacity) {
      problems.push_back(tensor.spec.name + " must hold " + std::to_string(sidecar.capacity) + " tokens, found " +
                         list_text(tensor.spec.dims));
    }
  }
  return problems;
}

}  // namespace crt
