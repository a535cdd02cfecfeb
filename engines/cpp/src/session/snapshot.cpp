// Snapshots as safetensors files; crt_export/runtime/snapshot.py describes what is in them.
#include "crt_runtime/snapshot.hpp"

#include <algorithm>
#include <new>

#include "bundle/message_text.hpp"
#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"
#include "session/safetensors.hpp"

namespace crt {

namespace {

constexpr char kFormat[] = "crt-export snapshot";
constexpr std::int64_t kFormatVersion = 1;

/// SHA-256 over the bytes of all tensors in order of their sorted names.
std::string digest_of(const std::vector<SnapshotTensor>& tensors) {
  std::vector<const SnapshotTensor*> sorted;
  for (const SnapshotTensor& tensor : tensors) {
    sorted.push_back(&tensor);
  }
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
  Sha256 digest;
  for (const SnapshotTensor* tensor : sorted) {
    digest.update(tensor->data.data(), tensor->data.size());
  }
  return digest.hex();
}

/// Format and version, before anything else is read.
void check_metadata(const std::string& path, const SafetensorsFile& file) {
  const auto refuse = [&path](const std::string& text) { throw Error(ErrorKind::bundle, path + text); };
  const std::string* format = file.metadata("format");
  if (format == nullptr || *format != kFormat) {
    refuse(" is not a snapshot: its format is " + (format == nullptr ? "None" : in_quotes(*format, 80)) + ", not '" +
           kFormat + "'");
  }
  const std::string* given = file.metadata("format_version");
  const std::string version = given == nullptr ? "" : *given;
  const bool digits = !version.empty() && version.find_first_not_of("0123456789") == std::string::npos;
  const std::int64_t number = digits ? std::stoll(version.substr(0, 9)) : 0;
  if (number < 1) {
    refuse(" is not a snapshot: its format version is " + in_quotes(version, 80));
  }
  if (number > kFormatVersion) {
    refuse(" has format version " + first_characters(version, 20) + "; this version reads up to " +
           std::to_string(kFormatVersion) + ": upgrade crt-export");
  }
  std::vector<std::string> missing;
  for (const char* key : {"bundle", "target", "sha256"}) {
    if (file.metadata(key) == nullptr) {
      missing.emplace_back(key);
    }
  }
  if (!missing.empty()) {
    refuse(" is not a snapshot: its metadata lack " + joined(missing));
  }
}

Snapshot read_snapshot(const std::string& path) {
  const SafetensorsFile file(path);
  check_metadata(path, file);
  Snapshot snapshot{*file.metadata("bundle"), *file.metadata("target"), file.tensors()};
  const std::string digest = digest_of(snapshot.tensors);
  if (digest != *file.metadata("sha256")) {
    throw Error(ErrorKind::bundle, path + " is damaged: its tensors have SHA-256 " + digest + ", its metadata say " +
                                       in_quotes(*file.metadata("sha256"), 80));
  }
  return snapshot;
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
    write_safetensors(path,
                      {{"format", kFormat},
                       {"format_version", std::to_string(kFormatVersion)},
                       {"bundle", bundle},
                       {"target", target},
                       {"sha256", digest_of(tensors)}},
                      tensors);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::input, "cannot write the snapshot " + path + ": " + error.what());
  }
}

Snapshot Snapshot::load(const std::string& path) {
  if (holds_nul(path)) {
    throw Error(ErrorKind::bundle, "expected a snapshot file, found a path with a NUL byte: " + in_quotes(path));
  }
  const auto damaged = [&path](const std::string& reason) {
    return Error(ErrorKind::bundle, path + " is not a snapshot or damaged: " + reason);
  };
  try {
    return read_snapshot(path);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "expected a snapshot file, found nothing that can be read as one: " + path + " (" +
                                       error.what() + ")");
  } catch (const JsonError& error) {
    throw damaged(std::string("its header ") + error.what());
  } catch (const SafetensorsError& error) {
    throw damaged(error.what());
  } catch (const std::bad_alloc&) {
    throw damaged("its tensors do not fit into memory");
  }
}

}  // namespace crt
