// Which address every tensor of a TensorRT launch gets, checked before anything is bound.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.hpp"
#include "tensorrt/cuda_memory.hpp"
#include "tensorrt/tensorrt_engine.hpp"

namespace crt {

/// What TensorRT asks of every address (IExecutionContext::setTensorAddress).
constexpr std::size_t kAddressAlignment = 256;

/// One tensor of a launch.
struct PlannedTensor {
  std::string name;
  BufferSlice rows;
  bool is_input = false;
  std::optional<std::size_t> in_place_of;  // an output updated in place: index of its input
  std::size_t bytes = 0;
  void* home = nullptr;   // where the session keeps it
  void* bound = nullptr;  // where the engine finds it: home, or its staging memory
};

/// The tensors of one launch, inputs first.
class BindingPlan {
 public:
  /// Throws Error(contract), naming every tensor that is missing, unknown, of another dtype or shape, a cache that is
  /// not bound in place, and any other output that overlaps an input or an output.
  BindingPlan(const LoadedEngine& engine, const Binding& inputs, const Binding& outputs);

  /// Place tensors whose address TensorRT would refuse in staging memory, all others where they are.
  void place(const std::shared_ptr<Device>& device);
  /// Whether a buffer has moved since place().
  bool moved() const;
  /// Give a context every shape and address.
  void apply(ExecutionContext& context) const;

  /// Bring staged inputs to where the engine reads them.
  void stage_inputs(Device& device, Stream stream) const;
  /// Bring staged outputs to where the session keeps them.
  void unstage_outputs(Device& device, Stream stream) const;

  const std::vector<PlannedTensor>& tensors() const noexcept { return tensors_; }

 private:
  void add(const EngineTensor& tensor, const Binding& binding, std::vector<std::string>& problems);
  void pair_in_place(const LoadedEngine& engine, std::vector<std::string>& problems);
  void check_overlaps(std::vector<std::string>& problems) const;

  std::vector<PlannedTensor> tensors_;
  std::vector<std::unique_ptr<DeviceMemory>> staging_;
};

}  // namespace crt
