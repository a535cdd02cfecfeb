#include "session/tensor_file.hpp"

#include <algorithm>
#include <iterator>
#include <memory>
#include <new>
#include <utility>

#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"
#include "session/safetensors.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

/// SHA-256 over the bytes of all tensors in order of their sorted names.
std::string digest_of(const std::vector<SnapshotTensor>& tensors) {
  std::vector<const SnapshotTensor*> sorted;
  for (const SnapshotTensor& tensor : tensors) sorted.push_back(&tensor);
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->name < b->name; });
  Sha256 digest;
  for (const SnapshotTensor* tensor : sorted) digest.update(tensor->data.data(), tensor->data.size());
  return digest.hex();
}

/// Format and version, before anything else is read.
void check_metadata(const TensorFileKind& kind, const std::string& path, const SafetensorsFile& file) {
  const auto refuse = [&path](const std::string& text) { throw Error(ErrorKind::bundle, path + text); };
  const std::string* format = file.metadata("format");
  if (format == nullptr || *format != kind.format) {
    refuse(" is not " + kind.title + ": its format is " + (format == nullptr ? "None" : in_quotes(*format, 80)) +
           ", not '" + kind.format + "'");
  }
  const std::string* given = file.metadata("format_version");
  const std::string version = given == nullptr ? "" : *given;
  const bool digits = !version.empty() && version.find_first_not_of("0123456789") == std::string::npos;
  const std::int64_t number = digits ? std::stoll(version.substr(0, 9)) : 0;
  if (number < 1) refuse(" is not " + kind.title + ": its format version is " + in_quotes(version, 80));
  if (number > kind.version) {
    refuse(" has format version " + first_characters(version, 20) + "; this version reads up to " +
           std::to_string(kind.version) + ": upgrade crt-export");
  }
  std::vector<std::string> wanted = kind.required;
  wanted.emplace_back("sha256");
  std::vector<std::string> missing;
  std::copy_if(wanted.begin(), wanted.end(), std::back_inserter(missing),
               [&file](const std::string& key) { return file.metadata(key) == nullptr; });
  if (!missing.empty()) refuse(" is not " + kind.title + ": its metadata lack " + joined(missing));
}

TensorFile read_checked(const TensorFileKind& kind, const std::string& path,
                        std::shared_ptr<const RegularFile> opened) {
  const SafetensorsFile file(std::move(opened));
  check_metadata(kind, path, file);
  const auto check = [&](const std::string& digest) {
    if (digest != *file.metadata("sha256")) {
      throw Error(ErrorKind::bundle, path + " is damaged: its tensors have SHA-256 " + digest + ", its metadata say " +
                                         in_quotes(*file.metadata("sha256"), 80));
    }
  };
  check(file.digest());  // before there is memory for any tensor
  TensorFile found{{}, file.tensors()};
  check(digest_of(found.tensors));  // the file may have been written to meanwhile
  for (const std::string& key : kind.required) found.metadata[key] = *file.metadata(key);
  return found;
}

}  // namespace

TensorFile read_tensor_file(const TensorFileKind& kind, const std::string& path) {
  return read_tensor_file(kind, path, std::make_shared<RegularFile>(real_path(path)));
}

TensorFile read_tensor_file(const TensorFileKind& kind, const std::string& path,
                            std::shared_ptr<const RegularFile> file) {
  const auto damaged = [&](const std::string& reason) {
    return Error(ErrorKind::bundle, path + " is not " + kind.title + " or damaged: " + reason);
  };
  try {
    return read_checked(kind, path, std::move(file));
  } catch (const JsonError& error) {
    throw damaged(std::string("its header ") + error.what());
  } catch (const SafetensorsError& error) {
    throw damaged(error.what());
  } catch (const std::bad_alloc&) {
    throw damaged("its tensors do not fit into memory");
  }
}

void write_tensor_file(const TensorFileKind& kind, const std::string& path,
                       std::map<std::string, std::string> metadata, const std::vector<SnapshotTensor>& tensors) {
  metadata["format"] = kind.format;
  metadata["format_version"] = std::to_string(kind.version);
  metadata["sha256"] = digest_of(tensors);
  write_safetensors(path, metadata, tensors);
}

}  // namespace crt
