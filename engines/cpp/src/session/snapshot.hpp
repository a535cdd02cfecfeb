// What a session's snapshot must hold: names, dtypes, shapes and values.
// The C++ twin of crt_export/runtime/snapshot.py.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "crt_runtime/snapshot.hpp"
#include "session/decoder.hpp"

namespace crt {

/// safetensors name of a dtype: "I64", "F32" or "F16".
const char* snapshot_dtype(DType dtype) noexcept;

/// Dtype and shape as Python's messages show them: "float32 [1, 256]".
std::string form_text(const std::string& dtype, const std::vector<std::int64_t>& shape);

/// The elements of a tensor; its bytes may lie at any address.
template <typename Value>
std::vector<Value> values_of(const SnapshotTensor& tensor) {
  std::vector<Value> values(tensor.data.size() / sizeof(Value));
  if (!values.empty()) std::memcpy(values.data(), tensor.data.data(), values.size() * sizeof(Value));
  return values;
}

/// The tensor of this name; nullptr if there is none.
const SnapshotTensor* find_tensor(const Snapshot& snapshot, const std::string& name) noexcept;

/// Refuse a snapshot that a session cannot go on from; nothing of it is trusted. Throws Error(bundle): another bundle,
/// target or batch, tensors missing, unknown or of another dtype or shape, more tokens than the session's capacity, or
/// values that no session holds. Lists every problem of a kind.
void check_snapshot(const Snapshot& snapshot, const SessionSetup& setup);

}  // namespace crt
