// Snapshots: files of them, and whether a session can go on from one; crt_export/runtime/snapshot.py describes them.
#include "session/snapshot.hpp"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "bundle/held_files.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/snapshot.hpp"
#include "engine/tensor_names.hpp"
#include "session/floats.hpp"
#include "session/history.hpp"
#include "session/tensor_file.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

const TensorFileKind& snapshot_kind() {
  static const TensorFileKind kind{"crt-export snapshot", 1, "a snapshot", {"bundle", "target"}};
  return kind;
}

/// The system would end the name there, and write or read another file.
bool holds_nul(const std::string& path) noexcept { return path.find('\0') != std::string::npos; }

}  // namespace

void Snapshot::save(const std::string& path) const {
  if (holds_nul(path)) {
    throw Error(ErrorKind::input,
                "cannot write the snapshot " + in_quotes(path) + ": a path must not hold a NUL byte");
  }
  try {
    write_tensor_file(snapshot_kind(), path, {{"bundle", bundle}, {"target", target}}, tensors);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::input, "cannot write the snapshot " + path + ": " + error.what());
  }
}

Snapshot Snapshot::load(const std::string& path) {
  if (holds_nul(path)) {
    throw Error(ErrorKind::bundle, "expected a snapshot file, found a path with a NUL byte: " + in_quotes(path));
  }
  try {
    TensorFile file = read_tensor_file(snapshot_kind(), path);
    return {file.metadata.at("bundle"), file.metadata.at("target"), std::move(file.tensors)};
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "expected a snapshot file, found nothing that can be read as one: " + path + " (" +
                                       error.what() + ")");
  }
}

namespace {

struct ExpectedTensor {
  std::string name;
  std::string dtype;
  Shape shape;
};

using Problems = std::vector<std::string>;

std::string row_text(std::size_t row) { return "row " + std::to_string(row) + ": "; }

/// dtype as Python's messages name it.
std::string dtype_text(const std::string& dtype) {
  static const std::vector<std::pair<std::string, std::string>> names{
      {"I64", "int64"}, {"F32", "float32"}, {"F16", "float16"}, {"U8", "uint8"}};
  const auto found = std::find_if(names.begin(), names.end(), [&](const auto& pair) { return pair.first == dtype; });
  return found == names.end() ? dtype : found->second;
}

std::size_t dtype_bytes(const std::string& dtype) noexcept {
  return dtype == "I64" ? 8 : dtype == "F32" ? 4 : dtype == "F16" ? 2 : 1;
}

/// Whether the data of a tensor is as long as its shape says.
bool whole(const SnapshotTensor& tensor) {
  std::size_t count = dtype_bytes(tensor.dtype);
  for (const std::int64_t dim : tensor.shape) count *= static_cast<std::size_t>(dim);
  return count == tensor.data.size();
}

std::vector<ExpectedTensor> expected_tensors(const TensorSizes& sizes, std::int64_t length) {
  std::vector<ExpectedTensor> expected;
  for (const char* name : {names::kPosition, "next_tokens", "drawn", "pending", "held"}) {
    expected.push_back({name, "I64", {sizes.batch}});
  }
  expected.push_back({"recent", "I64", {sizes.batch, static_cast<std::int64_t>(kRecentTokens)}});
  expected.push_back({names::kLogits, "F32", {sizes.batch, sizes.model.vocab}});
  expected.push_back({"seen", "U8", {sizes.batch, sizes.model.vocab}});
  for (const StateSpec& state : sizes.model.states) {
    expected.push_back({names::state(state.name), "F32", shape_of_tokens(sizes.batch, 1, state.shape)});
  }
  for (std::size_t index = 0; index < 2 * sizes.model.caches.size(); ++index) {
    const CacheSpec& spec = sizes.model.caches[index / 2];
    expected.push_back({cache_name(index), snapshot_dtype(sizes.cache_dtype),
                        {sizes.batch, spec.heads, length, spec.head_dim}});
  }
  return expected;
}

Problems origin_problems(const Snapshot& snapshot, const SessionSetup& setup) {
  Problems problems;
  if (snapshot.bundle != setup.bundle) {
    problems.push_back("it was taken with the bundle " + first_characters(snapshot.bundle, 16) + ", this one is " +
                       first_characters(setup.bundle, 16) +
                       " (SHA-256 of manifest.json): open the bundle it was taken with");
  }
  if (snapshot.target != setup.target) {
    problems.push_back("it was taken on target " + in_quotes(snapshot.target) + ", this session runs on " +
                       in_quotes(setup.target));
  }
  return problems;
}

Problems position_problems(const Snapshot& snapshot, const TensorSizes& sizes) {
  const SnapshotTensor* position = find_tensor(snapshot, names::kPosition);
  if (position == nullptr || position->dtype != "I64" || position->shape.size() != 1 || !whole(*position)) {
    return {"position must be int64 [batch]"};
  }
  if (position->shape[0] != sizes.batch) {
    return {"it holds " + std::to_string(position->shape[0]) + " rows, this session has a batch of " +
            std::to_string(sizes.batch)};
  }
  Problems problems;
  const std::vector<std::int64_t> values = values_of<std::int64_t>(*position);
  for (std::size_t row = 0; row < values.size(); ++row) {
    if (values[row] < 0 || values[row] > sizes.capacity) {
      problems.push_back("row " + std::to_string(row) + " holds " + std::to_string(values[row]) +
                         " tokens, this session has a capacity of " + std::to_string(sizes.capacity));
    }
  }
  return problems;
}

Problems shape_problems(const Snapshot& snapshot, const TensorSizes& sizes) {
  Problems problems = position_problems(snapshot, sizes);
  if (!problems.empty()) return problems;
  const std::vector<std::int64_t> position = values_of<std::int64_t>(*find_tensor(snapshot, names::kPosition));
  std::set<std::string> known;
  std::set<std::string> found_once;
  for (const ExpectedTensor& wanted : expected_tensors(sizes, *std::max_element(position.begin(), position.end()))) {
    known.insert(wanted.name);
    const SnapshotTensor* found = find_tensor(snapshot, wanted.name);
    if (found == nullptr) {
      problems.push_back(wanted.name + " is missing");
    } else if (found->dtype != wanted.dtype || found->shape != wanted.shape) {
      problems.push_back(wanted.name + " must be " + form_text(wanted.dtype, wanted.shape) + ", found " +
                         form_text(found->dtype, found->shape));
    } else if (!whole(*found)) {
      problems.push_back(wanted.name + " has " + std::to_string(found->data.size()) +
                         " bytes, which is not what its shape takes");
    }
  }
  for (const SnapshotTensor& tensor : snapshot.tensors) {
    if (known.count(tensor.name) == 0) {
      problems.push_back(tensor.name + " is unknown");
    } else if (!found_once.insert(tensor.name).second) {
      problems.push_back(tensor.name + " stands twice");
    }
  }
  return problems;
}

bool finite(const unsigned char* data, const std::string& dtype, std::size_t bytes) {
  if (dtype == "F32") {
    std::vector<float> values(bytes / sizeof(float));
    if (!values.empty()) std::memcpy(values.data(), data, values.size() * sizeof(float));
    return all_finite(values.data(), values.size());
  }
  for (std::size_t index = 0; dtype == "F16" && index + 1 < bytes; index += 2) {
    std::uint16_t half = 0;
    std::memcpy(&half, data + index, sizeof half);
    if (!is_finite_float16(half)) return false;
  }
  return true;
}

/// Whether what a row with tokens has of this tensor is finite; beyond the position a restore zeroes the caches anyway.
bool finite_row(const SnapshotTensor& tensor, std::size_t row, std::int64_t position) {
  const std::size_t row_bytes = tensor.data.size() / static_cast<std::size_t>(tensor.shape[0]);
  const unsigned char* first = tensor.data.data() + row * row_bytes;
  if (tensor.name.rfind("past_key_values.", 0) != 0) return finite(first, tensor.dtype, row_bytes);
  const auto heads = static_cast<std::size_t>(tensor.shape[1]);
  const std::size_t head_bytes = row_bytes / heads;
  const std::size_t token_bytes = head_bytes / static_cast<std::size_t>(tensor.shape[2]);
  for (std::size_t head = 0; head < heads; ++head) {
    if (!finite(first + head * head_bytes, tensor.dtype, static_cast<std::size_t>(position) * token_bytes)) {
      return false;
    }
  }
  return true;
}

// A session that goes on counts further, and the count must never overflow.
constexpr std::int64_t kMostDraws = std::int64_t{1} << 62U;

/// Of the tokens and the text that a row goes on from.
void add_text_problems(std::size_t row, const std::int64_t* recent, std::int64_t held, std::int64_t vocab,
                       Problems& problems) {
  const auto outside = [vocab](std::int64_t token) { return token < kTextEnd || token >= vocab; };
  if (std::any_of(recent, recent + kRecentTokens, outside)) {
    problems.push_back(row_text(row) + "a recent token is outside the vocabulary (0 to " + std::to_string(vocab - 1) +
                       ", -1 for none)");
  }
  if (held < 0) problems.push_back(row_text(row) + std::to_string(held) + " characters held back, must be at least 0");
}

Problems value_problems(const Snapshot& snapshot, const TensorSizes& sizes) {
  const auto of = [&](const char* name) { return values_of<std::int64_t>(*find_tensor(snapshot, name)); };
  const std::vector<std::int64_t> position = of(names::kPosition), pending = of("pending");
  const std::vector<std::int64_t> following = of("next_tokens"), drawn = of("drawn");
  const std::vector<std::int64_t> recent = of("recent"), held = of("held");
  const std::vector<unsigned char>& seen = find_tensor(snapshot, "seen")->data;
  const std::string last = std::to_string(sizes.model.vocab - 1);
  Problems problems;
  for (std::size_t row = 0; row < position.size(); ++row) {
    for (const SnapshotTensor& tensor : snapshot.tensors) {
      if (position[row] > 0 && !finite_row(tensor, row, position[row])) {
        problems.push_back(row_text(row) + tensor.name + " is not finite");
      }
    }
    if (pending[row] < -1 || pending[row] >= sizes.model.vocab) {
      problems.push_back(row_text(row) + "the pending token " + std::to_string(pending[row]) +
                         " is outside the vocabulary (0 to " + last + ", -1 for none)");
    }
    if (position[row] > 0 && (following[row] < 0 || following[row] >= sizes.model.vocab)) {
      problems.push_back(row_text(row) + "the next token " + std::to_string(following[row]) +
                         " is outside the vocabulary (0 to " + last + ")");
    }
    if (drawn[row] < 0 || drawn[row] > kMostDraws) {
      problems.push_back(row_text(row) + std::to_string(drawn[row]) + " random draws, must be 0 to " +
                         std::to_string(kMostDraws));
    }
    const auto begin = seen.begin() + static_cast<std::ptrdiff_t>(row) * sizes.model.vocab;
    if (std::any_of(begin, begin + sizes.model.vocab, [](unsigned char value) { return value > 1; })) {
      problems.push_back(row_text(row) + "seen must be 0 or 1");
    }
    add_text_problems(row, recent.data() + row * kRecentTokens, held[row], sizes.model.vocab, problems);
  }
  return problems;
}

}  // namespace

std::string form_text(const std::string& dtype, const std::vector<std::int64_t>& shape) {
  return dtype_text(dtype) + " " + list_text(shape);
}

const char* snapshot_dtype(DType dtype) noexcept {
  switch (dtype) {
    case DType::int64: return "I64";
    case DType::float32: return "F32";
    case DType::float16: return "F16";
  }
  return "";
}

const SnapshotTensor* find_tensor(const Snapshot& snapshot, const std::string& name) noexcept {
  const auto found = std::find_if(snapshot.tensors.begin(), snapshot.tensors.end(),
                                  [&name](const SnapshotTensor& tensor) { return tensor.name == name; });
  return found == snapshot.tensors.end() ? nullptr : &*found;
}

void check_snapshot(const Snapshot& snapshot, const SessionSetup& setup) {
  Problems problems = origin_problems(snapshot, setup);
  if (problems.empty()) problems = shape_problems(snapshot, setup.sizes);
  if (problems.empty()) problems = value_problems(snapshot, setup.sizes);
  refuse_problems(ErrorKind::bundle, "this session cannot restore the snapshot", problems);
}

}  // namespace crt
