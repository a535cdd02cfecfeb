#include "engine/contract.hpp"

#include <algorithm>

#include "bundle/message_text.hpp"
#include "bundle/problem_list.hpp"
#include "crt_runtime/error.hpp"

namespace crt {

namespace {

constexpr std::int64_t kDynamic = -1;

std::string dims_text(const Shape& dims) {
  std::vector<std::string> parts;
  for (const std::int64_t dim : dims) {
    parts.push_back(dim == kDynamic ? "?" : std::to_string(dim));
  }
  return "[" + joined(parts) + "]";
}

bool same_dims(const Shape& wanted, const Shape& found) {
  return std::equal(wanted.begin(), wanted.end(), found.begin(), found.end(), [](std::int64_t a, std::int64_t b) {
    return a == b || a == kDynamic || b == kDynamic;
  });
}

const TensorSpec* find_spec(const std::vector<TensorSpec>& specs, const std::string& name) {
  const auto found =
      std::find_if(specs.begin(), specs.end(), [&name](const TensorSpec& spec) { return spec.name == name; });
  return found == specs.end() ? nullptr : &*found;
}

/// The contract's tensor as this target has it: a cache may have another dtype.
TensorSpec of_target(TensorSpec spec, const Target& target) {
  if (spec.name.find("key_values.") != std::string::npos && !spec.dims.empty()) {
    spec.dtype = target.cache_dtype;
  }
  return spec;
}

std::vector<std::string> side_problems(const std::vector<TensorSpec>& contract, const std::vector<TensorSpec>& loaded,
                                       const Target& target) {
  std::vector<std::string> problems;
  for (const TensorSpec& found : loaded) {
    if (find_spec(contract, found.name) == nullptr) {
      problems.push_back(found.name + " is not part of the contract");
    }
  }
  for (const TensorSpec& entry : contract) {
    const TensorSpec wanted = of_target(entry, target);
    const TensorSpec* found = find_spec(loaded, wanted.name);
    if (found == nullptr) {
      problems.push_back(wanted.name + " is missing");
    } else if (found->dtype != wanted.dtype || !same_dims(wanted.dims, found->dims)) {
      problems.push_back(found->name + ": " + name_of(found->dtype) + " " + dims_text(found->dims) +
                         " was expected to be " + name_of(wanted.dtype) + " " + dims_text(wanted.dims));
    }
  }
  std::sort(problems.begin(), problems.end());
  return problems;
}

}  // namespace

std::vector<std::string> contract_problems(const BundleFiles& files, const Target& target, const std::string& graph,
                                           const Program& program) {
  const GraphContract& contract = files.contract(graph);
  std::vector<std::string> problems;
  for (const std::string& text : side_problems(contract.inputs, program.inputs(), target)) {
    problems.push_back(graph + ": input " + text);
  }
  for (const std::string& text : side_problems(contract.outputs, program.outputs(), target)) {
    problems.push_back(graph + ": output " + text);
  }
  return problems;
}

void refuse_broken_contract(const Target& target, const std::vector<std::string>& problems) {
  if (!problems.empty()) {
    throw Error(ErrorKind::contract, problem_list("the graphs of " + target.name + " break the contract", problems));
  }
}

}  // namespace crt
