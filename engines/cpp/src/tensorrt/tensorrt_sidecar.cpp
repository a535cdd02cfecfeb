#include "tensorrt/tensorrt_sidecar.hpp"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <locale>
#include <sstream>

#include "bundle/problem_list.hpp"
#include "crt_runtime/error.hpp"
#include "tensorrt/tensorrt_plan.hpp"

namespace crt {

namespace {

constexpr const char* kAgain =
    "the bundle was changed after it was built; build it again or restore it from its source";

std::string product_of(const Target& target) {
  return target.runtime == "tensorrt-rtx" ? "TensorRT-RTX" : "TensorRT";
}

std::string dotted(int compute_capability) {
  return std::to_string(compute_capability / 10) + "." + std::to_string(compute_capability % 10);
}

std::vector<std::string> target_problems(const EngineSidecar& sidecar, const Target& target, const std::string& graph) {
  std::vector<std::string> problems;
  const auto expect = [&problems](const char* key, const std::string& wanted, const std::string& found) {
    if (wanted != found) {
      problems.push_back(std::string(key) + " " + wanted + " expected, " + found + " found");
    }
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
  if (host.compute_capability == built || (sidecar.ampere_plus && host.compute_capability > built)) {
    return;
  }
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

void check_sidecar(const std::string& engine_file, const EngineSidecar& sidecar, const Target& target,
                   const std::string& graph, const EngineHost& host) {
  std::vector<std::string> problems = target_problems(sidecar, target, graph);
  if (!problems.empty()) {
    const std::string heading = "the sidecar of " + engine_file + " does not fit " + target.name;
    throw Error(ErrorKind::bundle, problem_list(heading, problems) + "\n" + kAgain);
  }
  add_version_problem(sidecar, target, host, problems);
  add_gpu_problem(sidecar, host, problems);
  if (!problems.empty()) {
    throw Error(ErrorKind::missing_dependency, problem_list(engine_file + " cannot run on this machine", problems));
  }
}

std::vector<std::string> engine_problems(const std::vector<EngineTensor>& tensors, const EngineSidecar& sidecar,
                                         const GraphContract& contract) {
  std::vector<std::string> problems;
  for (const auto& [name, shapes] : sidecar.input_shapes) {
    const EngineTensor* tensor = find(tensors, name);
    if (tensor != nullptr && (tensor->least != shapes[0] || tensor->most != shapes[2])) {
      problems.push_back(name + " must take shapes " + text_of(shapes[0]) + " to " + text_of(shapes[2]) + ", found " +
                         text_of(tensor->least) + " to " + text_of(tensor->most));
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
                         text_of(tensor.spec.dims));
    }
  }
  return problems;
}

}  // namespace crt
