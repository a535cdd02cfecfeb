#include "tensorrt/tensorrt_plan.hpp"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "crt_runtime/error.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

bool within(const Shape& shape, const Shape& least, const Shape& most) {
  if (shape.size() != least.size() || shape.size() != most.size()) return false;
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    if (shape[axis] < least[axis] || shape[axis] > most[axis]) return false;
  }
  return true;
}

bool fits(const EngineTensor& tensor, const Shape& shape) {
  if (tensor.is_input) return within(shape, tensor.least, tensor.most);
  const Shape& dims = tensor.spec.dims;
  return std::equal(dims.begin(), dims.end(), shape.begin(), shape.end(),
                    [](std::int64_t dim, std::int64_t size) { return dim == -1 || dim == size; });
}

std::string limits_of(const EngineTensor& tensor) {
  return tensor.is_input ? list_text(tensor.least) + " to " + list_text(tensor.most) : list_text(tensor.spec.dims);
}

void add_problems(const EngineTensor& tensor, const BufferSlice& rows, std::vector<std::string>& problems) {
  const std::string& name = tensor.spec.name;
  if (rows.buffer == nullptr || rows.start < 0 || rows.start >= rows.stop || rows.stop > rows.buffer->shape()[0]) {
    problems.push_back(name + ": rows " + std::to_string(rows.start) + " to " + std::to_string(rows.stop) +
                       " are no rows of its buffer");
    return;
  }
  if (rows.buffer->dtype() != tensor.spec.dtype) {
    problems.push_back(name + " must be " + name_of(tensor.spec.dtype) + ", found " + name_of(rows.buffer->dtype()));
  }
  if (!fits(tensor, rows.shape())) {
    problems.push_back(name + " must have shape " + limits_of(tensor) + ", found " + list_text(rows.shape()));
  }
}

void add_unknown(const LoadedEngine& engine, const Binding& binding, bool is_input,
                 std::vector<std::string>& problems) {
  for (const auto& bound : binding) {
    const auto& tensors = engine.tensors();
    const bool known = std::any_of(tensors.begin(), tensors.end(), [&](const EngineTensor& tensor) {
      return tensor.is_input == is_input && tensor.spec.name == bound.first;
    });
    if (!known) problems.push_back(bound.first + " is no " + (is_input ? "input" : "output") + " of the engine");
  }
}

bool overlap(const PlannedTensor& one, const PlannedTensor& other) {
  const auto* a = static_cast<const unsigned char*>(one.home);
  const auto* b = static_cast<const unsigned char*>(other.home);
  const std::less<> before;  // the built-in < says nothing of pointers into different allocations
  return before(a, b + other.bytes) && before(b, a + one.bytes);
}

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kAddressAlignment == 0; }

}  // namespace

BindingPlan::BindingPlan(const LoadedEngine& engine, const Binding& inputs, const Binding& outputs) {
  std::vector<std::string> problems;
  for (const bool is_input : {true, false}) {
    const Binding& binding = is_input ? inputs : outputs;
    for (const EngineTensor& tensor : engine.tensors()) {
      if (tensor.is_input == is_input) add(tensor, binding, problems);
    }
    add_unknown(engine, binding, is_input, problems);
  }
  if (problems.empty()) {
    pair_in_place(engine, problems);
    check_overlaps(problems);
  }
  refuse_problems(ErrorKind::contract, engine.label() + ": the bound tensors", problems);
}

void BindingPlan::add(const EngineTensor& tensor, const Binding& binding, std::vector<std::string>& problems) {
  const auto found = binding.find(tensor.spec.name);
  if (found == binding.end()) {
    problems.push_back(std::string(tensor.is_input ? "input " : "output ") + tensor.spec.name + " is missing");
    return;
  }
  const std::size_t before = problems.size();
  add_problems(tensor, found->second, problems);
  if (problems.size() == before) {
    PlannedTensor planned;
    planned.name = tensor.spec.name;
    planned.rows = found->second;
    planned.is_input = tensor.is_input;
    planned.bytes = planned.rows.bytes();
    planned.home = planned.rows.address();
    tensors_.push_back(std::move(planned));
  }
}

void BindingPlan::pair_in_place(const LoadedEngine& engine, std::vector<std::string>& problems) {
  const auto index_of = [this](const std::string& name) {
    const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                    [&name](const PlannedTensor& tensor) { return tensor.name == name; });
    return static_cast<std::size_t>(found - tensors_.begin());
  };
  for (const EngineTensor& tensor : engine.tensors()) {
    if (tensor.alias.empty()) continue;
    const std::size_t past = index_of(tensor.alias);
    PlannedTensor& present = tensors_[index_of(tensor.spec.name)];
    if (past == tensors_.size() || present.home != tensors_[past].home || present.bytes != tensors_[past].bytes) {
      problems.push_back(present.name + " must be at the address of " + tensor.alias + ", which it updates in place");
    } else {
      present.in_place_of = past;
    }
  }
}

void BindingPlan::check_overlaps(std::vector<std::string>& problems) const {
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const PlannedTensor& output = tensors_[i];
    for (std::size_t j = 0; j < i && !output.is_input; ++j) {
      const PlannedTensor& other = tensors_[j];
      const bool is_pair = output.in_place_of == j;
      const bool told_by_its_input = other.in_place_of.has_value();
      if (!is_pair && !told_by_its_input && overlap(output, other)) {
        problems.push_back(output.name + " shares memory with " + other.name);
      }
    }
  }
}

void BindingPlan::place(const std::shared_ptr<Device>& device) {
  staging_.clear();
  for (PlannedTensor& tensor : tensors_) {
    tensor.home = tensor.rows.address();
    if (tensor.in_place_of) {
      tensor.bound = tensors_[*tensor.in_place_of].bound;
    } else if (aligned(tensor.home)) {
      tensor.bound = tensor.home;
    } else {
      staging_.push_back(std::make_unique<DeviceMemory>(device, tensor.bytes));
      tensor.bound = staging_.back()->get();
    }
  }
}

bool BindingPlan::moved() const {
  return std::any_of(tensors_.begin(), tensors_.end(),
                     [](const PlannedTensor& tensor) { return tensor.rows.address() != tensor.home; });
}

void BindingPlan::apply(ExecutionContext& context) const {
  for (const PlannedTensor& tensor : tensors_) {
    if (tensor.is_input) context.set_input_shape(tensor.name, tensor.rows.shape());
    context.set_address(tensor.name, tensor.bound);
  }
}

void BindingPlan::stage_inputs(Device& device, Stream stream) const {
  for (const PlannedTensor& tensor : tensors_) {
    if (tensor.is_input && tensor.bound != tensor.home) device.copy(tensor.bound, tensor.home, tensor.bytes, stream);
  }
}

void BindingPlan::unstage_outputs(Device& device, Stream stream) const {
  for (const PlannedTensor& tensor : tensors_) {
    if (!tensor.is_input && tensor.bound != tensor.home) device.copy(tensor.home, tensor.bound, tensor.bytes, stream);
  }
}

}  // namespace crt
