// Snapshots as safetensors files; crt_export/runtime/snapshot.py describes what is in them.
#include "crt_runtime/snapshot.hpp"

#include <utility>

#include "bundle/message_text.hpp"
#include "bundle/paths.hpp"
#include "crt_runtime/error.hpp"
#include "session/tensor_file.hpp"

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

}  // namespace crt
