// Snapshots as safetensors files; crt_export/runtime/snapshot.py describes what is in them.
#include "crt_runtime/snapshot.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "crt_runtime/error.hpp"
#include "json.hpp"
#include "message_text.hpp"
#include "paths.hpp"
#include "safe_write.hpp"
#include "sha256.hpp"

namespace crt {

namespace {

constexpr char kFormat[] = "crt-export snapshot";
constexpr char kMetadata[] = "__metadata__";
constexpr std::int64_t kFormatVersion = 1;
constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMostHeaderBytes = 100'000'000;  // as the safetensors library

/// What is wrong with a file; the caller says which one.
class Damage : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct StoredTensor {
  SnapshotTensor tensor;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// Bytes per element; unset for a dtype that no snapshot has.
std::optional<std::uint64_t> element_bytes(const std::string& dtype) noexcept {
  if (dtype == "I64") {
    return 8;
  }
  if (dtype == "F32") {
    return 4;
  }
  if (dtype == "F16") {
    return 2;
  }
  if (dtype == "U8") {
    return 1;
  }
  return std::nullopt;
}

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

/// Tensors in the order that the safetensors library writes: largest elements first, so that all stay aligned.
std::vector<const SnapshotTensor*> in_file_order(const std::vector<SnapshotTensor>& tensors) {
  std::vector<const SnapshotTensor*> sorted;
  for (const SnapshotTensor& tensor : tensors) {
    sorted.push_back(&tensor);
  }
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) {
    const auto first = element_bytes(a->dtype).value_or(0);
    const auto second = element_bytes(b->dtype).value_or(0);
    return first != second ? first > second : a->name < b->name;
  });
  return sorted;
}

std::string length_bytes(std::uint64_t length) {
  std::string bytes;
  for (std::size_t index = 0; index < kLengthBytes; ++index) {
    bytes.push_back(static_cast<char>(length >> (8 * index) & 0xff));
  }
  return bytes;
}

std::string header_text(const Snapshot& snapshot, const std::vector<const SnapshotTensor*>& order) {
  nlohmann::ordered_json header;
  header[kMetadata] = {{"format", kFormat},
                       {"format_version", std::to_string(kFormatVersion)},
                       {"bundle", snapshot.bundle},
                       {"target", snapshot.target},
                       {"sha256", digest_of(snapshot.tensors)}};
  std::uint64_t begin = 0;
  for (const SnapshotTensor* tensor : order) {
    const std::uint64_t end = begin + tensor->data.size();
    header[tensor->name] = {{"dtype", tensor->dtype}, {"shape", tensor->shape}, {"data_offsets", {begin, end}}};
    begin = end;
  }
  std::string text = header.dump();
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');
  return text;
}

std::string read_text(const RegularFile& file, std::size_t count, std::uint64_t offset) {
  std::string text(count, '\0');
  if (file.read(text.data(), count, offset) != count) {
    throw Damage("it ends before byte " + std::to_string(offset + count));
  }
  return text;
}

JsonValue read_header(const RegularFile& file, std::uint64_t* data_begin) {
  const std::uint64_t size = file.state().size;
  if (size < kLengthBytes) {
    throw Damage("it has " + std::to_string(size) + " bytes, not even the length of a header");
  }
  const std::string bytes = read_text(file, kLengthBytes, 0);
  std::uint64_t length = 0;
  for (std::size_t index = kLengthBytes; index-- > 0;) {
    length = length << 8 | static_cast<unsigned char>(bytes[index]);
  }
  if (length > kMostHeaderBytes || length > size - kLengthBytes) {
    throw Damage("its header claims " + std::to_string(length) + " bytes, the file has " + std::to_string(size) +
                 ", and a header at most " + std::to_string(kMostHeaderBytes));
  }
  *data_begin = kLengthBytes + length;
  JsonValue header = parse_json(read_text(file, static_cast<std::size_t>(length), kLengthBytes));
  if (!header.is_object()) {
    throw Damage("its header must be a JSON object, found " + shown(header));
  }
  return header;
}

std::string metadata_of(const JsonValue* metadata, const char* key) {
  const JsonValue* value = metadata == nullptr ? nullptr : metadata->find(key);
  return value != nullptr && value->is_string() ? value->string() : std::string();
}

/// Format and version, before anything else is read.
void check_metadata(const std::string& path, const JsonValue* metadata) {
  const auto refuse = [&path](const std::string& text) { throw Error(ErrorKind::bundle, path + text); };
  const JsonValue* format = metadata == nullptr ? nullptr : metadata->find("format");
  if (format == nullptr || !format->is_string() || format->string() != kFormat) {
    refuse(" is not a snapshot: its format is " + (format == nullptr ? "None" : shown(*format, 80)) + ", not '" +
           kFormat + "'");
  }
  const std::string version = metadata_of(metadata, "format_version");
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
    const JsonValue* value = metadata->find(key);
    if (value == nullptr || !value->is_string()) {
      missing.emplace_back(key);
    }
  }
  if (!missing.empty()) {
    refuse(" is not a snapshot: its metadata lack " + joined(missing));
  }
}

/// Whole numbers of at least 0; throws Damage for anything else.
std::vector<std::int64_t> counts(const std::string& name, const char* key, const JsonValue& entry) {
  const JsonValue* list = entry.find(key);
  std::vector<std::int64_t> values;
  bool sound = list != nullptr && list->is_array();
  for (std::size_t index = 0; sound && index < list->array().size(); ++index) {
    const JsonValue& value = list->array()[index];
    sound = value.is_integer() && value.integer() >= 0;
    values.push_back(sound ? value.integer() : 0);
  }
  if (!sound) {
    throw Damage(in_quotes(name, 80) + ": " + key + " must be a list of whole numbers of at least 0");
  }
  return values;
}

StoredTensor stored_tensor(const std::string& name, const JsonValue& entry) {
  StoredTensor stored;
  stored.tensor.name = name;
  stored.tensor.dtype = metadata_of(&entry, "dtype");
  stored.tensor.shape = counts(name, "shape", entry);
  const std::vector<std::int64_t> offsets = counts(name, "data_offsets", entry);
  const std::optional<std::uint64_t> width = element_bytes(stored.tensor.dtype);
  if (!width) {
    throw Damage(in_quotes(name, 80) + " is " + in_quotes(stored.tensor.dtype, 80) +
                 "; a snapshot has I64, F32, F16, U8 only");
  }
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    throw Damage(in_quotes(name, 80) + ": data_offsets must be begin and end");
  }
  stored.begin = static_cast<std::uint64_t>(offsets[0]);
  stored.end = static_cast<std::uint64_t>(offsets[1]);
  std::uint64_t left = stored.end - stored.begin;  // divided by every size in turn, so that nothing can overflow
  bool empty = false;
  bool exact = left % *width == 0;
  left /= *width;
  for (const std::int64_t dim : stored.tensor.shape) {
    empty = empty || dim == 0;
    exact = exact && (dim == 0 || left % static_cast<std::uint64_t>(dim) == 0);
    left = dim == 0 ? left : left / static_cast<std::uint64_t>(dim);
  }
  if (empty ? stored.end != stored.begin : !exact || left != 1) {
    throw Damage(in_quotes(name, 80) + ": its shape and its offsets tell different sizes");
  }
  return stored;
}

/// The tensors of a header, which must fill the rest of the file without gap or overlap.
std::vector<StoredTensor> stored_tensors(const JsonValue& header, std::uint64_t data_bytes) {
  std::vector<StoredTensor> tensors;
  for (const auto& [name, entry] : header.object().members()) {
    if (name != kMetadata) {
      tensors.push_back(stored_tensor(name, entry));
    }
  }
  std::sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::make_pair(a.begin, a.end) < std::make_pair(b.begin, b.end);
  });
  std::uint64_t next = 0;
  for (const StoredTensor& stored : tensors) {
    if (stored.begin != next) {
      throw Damage(in_quotes(stored.tensor.name, 80) + " begins at byte " + std::to_string(stored.begin) +
                   " of the data, expected " + std::to_string(next));
    }
    next = stored.end;
  }
  if (next != data_bytes) {
    throw Damage("its tensors take " + std::to_string(next) + " bytes, the file holds " + std::to_string(data_bytes));
  }
  return tensors;
}

Snapshot read_snapshot(const std::string& path, std::string* sha256) {
  const RegularFile file(real_path(path));
  std::uint64_t data_begin = 0;
  const JsonValue header = read_header(file, &data_begin);
  const JsonValue* metadata = header.find(kMetadata);
  check_metadata(path, metadata);
  Snapshot snapshot{metadata_of(metadata, "bundle"), metadata_of(metadata, "target"), {}};
  *sha256 = metadata_of(metadata, "sha256");
  for (StoredTensor& stored : stored_tensors(header, file.state().size - data_begin)) {
    std::vector<unsigned char>& data = stored.tensor.data;
    data.resize(static_cast<std::size_t>(stored.end - stored.begin));
    if (file.read(data.data(), data.size(), data_begin + stored.begin) != data.size()) {
      throw Damage("it became shorter while it was read");
    }
    snapshot.tensors.push_back(std::move(stored.tensor));
  }
  std::sort(snapshot.tensors.begin(), snapshot.tensors.end(),
            [](const SnapshotTensor& a, const SnapshotTensor& b) { return a.name < b.name; });
  return snapshot;
}

}  // namespace

void Snapshot::save(const std::string& path) const {
  const std::vector<const SnapshotTensor*> order = in_file_order(tensors);
  const std::string header = header_text(*this, order);
  try {
    SafeWrite file(path);
    file.write(length_bytes(header.size()));
    file.write(header);
    for (const SnapshotTensor* tensor : order) {
      file.write(std::string_view(reinterpret_cast<const char*>(tensor->data.data()), tensor->data.size()));
    }
    file.commit();
  } catch (const SystemError& error) {
    throw Error(ErrorKind::input, "cannot write the snapshot " + path + ": " + error.what());
  }
}

Snapshot Snapshot::load(const std::string& path) {
  const auto damaged = [&path](const std::string& reason) {
    return Error(ErrorKind::bundle, path + " is not a snapshot or damaged: " + reason);
  };
  Snapshot snapshot;
  std::string expected;
  try {
    snapshot = read_snapshot(path, &expected);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "expected a snapshot file, found nothing that can be read as one: " + path + " (" +
                                       error.what() + ")");
  } catch (const JsonError& error) {
    throw damaged(std::string("its header ") + error.what());
  } catch (const Damage& error) {
    throw damaged(error.what());
  }
  const std::string digest = digest_of(snapshot.tensors);
  if (digest != expected) {
    throw Error(ErrorKind::bundle, path + " is damaged: its tensors have SHA-256 " + digest + ", its metadata say " +
                                       in_quotes(expected, 80));
  }
  return snapshot;
}

}  // namespace crt
