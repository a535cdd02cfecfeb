#include "session/safetensors.hpp"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

#include "bundle/sha256.hpp"
#include "session/safe_write.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

constexpr char kMetadata[] = "__metadata__";
constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kMostHeaderBytes = std::uint64_t{8} << 20U;  // 80,000 tensors; parsing takes many times as much
constexpr std::uint64_t kPieceBytes = std::uint64_t{1} << 20U;

constexpr std::size_t kMostDims = 64;  // as numpy, so that both languages refuse the same files

struct StoredTensor {
  SnapshotTensor tensor;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
};

/// Bytes per element; unset for a dtype that no file of this package has.
std::optional<std::uint64_t> element_bytes(const std::string& dtype) noexcept {
  if (dtype == "I64") return 8;
  if (dtype == "F32") return 4;
  if (dtype == "F16") return 2;
  if (dtype == "U8") return 1;
  return std::nullopt;
}

/// Tensors in the order that the safetensors library writes: largest elements first, so that all stay aligned.
std::vector<const SnapshotTensor*> in_file_order(const std::vector<SnapshotTensor>& tensors) {
  std::vector<const SnapshotTensor*> sorted;
  for (const SnapshotTensor& tensor : tensors) sorted.push_back(&tensor);
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

/// A JSON string with the escapes of Python's json.dumps(ensure_ascii=False); U+FFFD for what is not UTF-8.
std::string quoted(const std::string& text) {
  constexpr char kHex[] = "0123456789abcdef";
  constexpr char kEscaped[] = "\"\\\b\f\n\r\t";
  constexpr char kLetters[] = "\"\\bfnrt";
  std::string result = "\"";
  for (std::size_t offset = 0; offset < text.size();) {
    const Utf8Prefix prefix = first_character(std::string_view(text).substr(offset));
    const char first = text[offset];
    const std::string_view escaped(kEscaped);
    if (prefix.kind != Utf8Prefix::complete) {
      result += kReplacementCharacter;
    } else if (const std::size_t index = escaped.find(first); index != std::string_view::npos) {
      result += {'\\', kLetters[index]};
    } else if (static_cast<unsigned char>(first) < 0x20) {
      result += {'\\', 'u', '0', '0', kHex[first >> 4 & 0xF], kHex[first & 0xF]};
    } else {
      result.append(text, offset, prefix.length);
    }
    offset += prefix.length;
  }
  return result + '"';
}

std::string shape_text(const std::vector<std::int64_t>& shape) {
  std::string text;
  for (const std::int64_t size : shape) text += (text.empty() ? "" : ",") + std::to_string(size);
  return "[" + text + "]";
}

/// Written here and not by nlohmann's document, whose constructors free what they never made where memory runs out.
std::string header_text(const std::map<std::string, std::string>& metadata,
                        const std::vector<const SnapshotTensor*>& order) {
  std::string entries;
  for (const auto& [key, value] : metadata) entries += (entries.empty() ? "" : ",") + quoted(key) + ":" + quoted(value);
  std::string text = "{" + quoted(kMetadata) + ":{" + entries + "}";
  std::uint64_t begin = 0;
  for (const SnapshotTensor* tensor : order) {
    const std::uint64_t end = begin + tensor->data.size();
    text += "," + quoted(tensor->name) + ":{\"dtype\":" + quoted(tensor->dtype) + ",\"shape\":" +
            shape_text(tensor->shape) + ",\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) +
            "]}";
    begin = end;
  }
  // A name that is not UTF-8 comes out changed, and its file is refused when it is read.
  text += "}";
  text.resize((text.size() + kLengthBytes - 1) / kLengthBytes * kLengthBytes, ' ');
  return text;
}

std::string read_text(const RegularFile& file, std::size_t count, std::uint64_t offset) {
  std::string text(count, '\0');
  if (file.read(text.data(), count, offset) != count) {
    throw SafetensorsError("it ends before byte " + std::to_string(offset + count));
  }
  return text;
}

JsonValue read_header(const RegularFile& file, std::uint64_t* data_begin) {
  const std::uint64_t size = file.state().size;
  if (size < kLengthBytes) {
    throw SafetensorsError("it has " + std::to_string(size) + " bytes, not even the length of a header");
  }
  const std::string bytes = read_text(file, kLengthBytes, 0);
  std::uint64_t length = 0;
  for (std::size_t index = kLengthBytes; index-- > 0;) length = length << 8 | static_cast<unsigned char>(bytes[index]);
  if (length > kMostHeaderBytes || length > size - kLengthBytes) {
    throw SafetensorsError("its header claims " + std::to_string(length) + " bytes, the file has " +
                           std::to_string(size) +
                 ", and a header at most " + std::to_string(kMostHeaderBytes));
  }
  *data_begin = kLengthBytes + length;
  JsonValue header = parse_json(read_text(file, static_cast<std::size_t>(length), kLengthBytes));
  if (!header.is_object()) throw SafetensorsError("its header must be a JSON object, found " + shown(header));
  return header;
}

/// Whole numbers of at least 0; throws SafetensorsError for anything else.
std::vector<std::int64_t> counts(const std::string& name, const char* key, const JsonValue& entry) {
  const JsonValue* list = entry.find(key);
  std::vector<std::int64_t> values;
  bool valid = list != nullptr && list->is_array();
  for (std::size_t index = 0; valid && index < list->array().size(); ++index) {
    const JsonValue& value = list->array()[index];
    valid = value.is_integer() && value.integer() >= 0;
    values.push_back(valid ? value.integer() : 0);
  }
  if (!valid) {
    throw SafetensorsError(in_quotes(name, 80) + ": " + key + " must be a list of whole numbers of at least 0");
  }
  return values;
}

std::string text_of(const JsonValue& entry, const char* key) {
  const JsonValue* value = entry.find(key);
  return value != nullptr && value->is_string() ? value->string() : std::string();
}

StoredTensor stored_tensor(const std::string& name, const JsonValue& entry) {
  StoredTensor stored;
  stored.tensor.name = name;
  stored.tensor.dtype = text_of(entry, "dtype");
  stored.tensor.shape = counts(name, "shape", entry);
  if (stored.tensor.shape.size() > kMostDims) {
    throw SafetensorsError(in_quotes(name, 80) + " has " + std::to_string(stored.tensor.shape.size()) +
                           " dims; a tensor has at most " + std::to_string(kMostDims));
  }
  const std::vector<std::int64_t> offsets = counts(name, "data_offsets", entry);
  const std::optional<std::uint64_t> width = element_bytes(stored.tensor.dtype);
  if (!width) {
    throw SafetensorsError(in_quotes(name, 80) + " is " + in_quotes(stored.tensor.dtype, 80) +
                 "; expected I64, F32, F16 or U8");
  }
  if (offsets.size() != 2 || offsets[0] > offsets[1]) {
    throw SafetensorsError(in_quotes(name, 80) + ": data_offsets must be begin and end");
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
    throw SafetensorsError(in_quotes(name, 80) + ": its shape and its offsets tell different sizes");
  }
  return stored;
}

/// The tensors of a header, which must fill the rest of the file without gap or overlap.
std::vector<StoredTensor> stored_tensors(const JsonValue& header, std::uint64_t data_bytes) {
  std::vector<StoredTensor> tensors;
  for (const auto& [name, entry] : header.object().members()) {
    if (name != kMetadata) tensors.push_back(stored_tensor(name, entry));
  }
  std::sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::make_pair(a.begin, a.end) < std::make_pair(b.begin, b.end);
  });
  std::uint64_t next = 0;
  for (const StoredTensor& stored : tensors) {
    if (stored.begin != next) {
      throw SafetensorsError(in_quotes(stored.tensor.name, 80) + " begins at byte " + std::to_string(stored.begin) +
                   " of the data, expected " + std::to_string(next));
    }
    next = stored.end;
  }
  if (next != data_bytes) {
    throw SafetensorsError("its tensors take " + std::to_string(next) + " bytes, the file holds " +
                           std::to_string(data_bytes));
  }
  return tensors;
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::shared_ptr<const RegularFile> file)
    : file_(std::move(file)), header_(read_header(*file_, &data_begin_)) {}

const std::string* SafetensorsFile::metadata(const std::string& key) const noexcept {
  const JsonValue* metadata = header_.find(kMetadata);
  const JsonValue* value = metadata == nullptr ? nullptr : metadata->find(key);
  return value != nullptr && value->is_string() ? &value->string() : nullptr;
}

std::string SafetensorsFile::digest() const {
  std::vector<StoredTensor> stored = stored_tensors(header_, file_->state().size - data_begin_);
  std::sort(stored.begin(), stored.end(),
            [](const StoredTensor& a, const StoredTensor& b) { return a.tensor.name < b.tensor.name; });
  Sha256 digest;
  std::vector<unsigned char> piece(static_cast<std::size_t>(kPieceBytes));
  for (const StoredTensor& tensor : stored) {
    for (std::uint64_t begin = tensor.begin; begin < tensor.end; begin += kPieceBytes) {
      const auto count = static_cast<std::size_t>(std::min(kPieceBytes, tensor.end - begin));
      if (file_->read(piece.data(), count, data_begin_ + begin) != count) {
        throw SafetensorsError("it became shorter while it was read");
      }
      digest.update(piece.data(), count);
    }
  }
  return digest.hex();
}

std::vector<SnapshotTensor> SafetensorsFile::tensors() const {
  std::vector<SnapshotTensor> tensors;
  for (StoredTensor& stored : stored_tensors(header_, file_->state().size - data_begin_)) {
    std::vector<unsigned char>& data = stored.tensor.data;
    data.resize(static_cast<std::size_t>(stored.end - stored.begin));
    if (file_->read(data.data(), data.size(), data_begin_ + stored.begin) != data.size()) {
      throw SafetensorsError("it became shorter while it was read");
    }
    tensors.push_back(std::move(stored.tensor));
  }
  std::sort(tensors.begin(), tensors.end(),
            [](const SnapshotTensor& a, const SnapshotTensor& b) { return a.name < b.name; });
  return tensors;
}

void write_safetensors(const std::string& path, const std::map<std::string, std::string>& metadata,
                       const std::vector<SnapshotTensor>& tensors) {
  const std::vector<const SnapshotTensor*> order = in_file_order(tensors);
  const std::string header = header_text(metadata, order);
  SafeWrite file(path);
  file.write(length_bytes(header.size()));
  file.write(header);
  for (const SnapshotTensor* tensor : order) {
    file.write(std::string_view(reinterpret_cast<const char*>(tensor->data.data()), tensor->data.size()));
  }
  file.commit();
}

}  // namespace crt
