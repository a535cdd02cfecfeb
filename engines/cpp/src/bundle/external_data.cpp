// A runtime opens whatever path stands in a tensor's external_data; so before a runtime may see a graph, every such
// path is read here and compared with the manifest. Only the few messages of onnx.proto (ONNX 1.23, IR version 14) on
// the way to a TensorProto are understood; all else is skipped. Never holds more than one short string and one block.
// Wire format: https://protobuf.dev/programming-guides/encoding/
#include "bundle/external_data.hpp"

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "bundle/held_files.hpp"
#include "crt_runtime/error.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

constexpr int kMaxDepth = 100;  // what protobuf itself allows
constexpr std::uint64_t kMaxString = 4096;
constexpr std::uint64_t kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5;
constexpr std::uint64_t kTensorName = 8, kTensorExternalData = 13, kTensorDataLocation = 14;
constexpr std::uint64_t kEntryKey = 1, kEntryValue = 2;
constexpr std::uint64_t kExternal = 1;  // TensorProto.DataLocation.EXTERNAL

enum class Message { model, training_info, graph, function, node, attribute, sparse_tensor, tensor };

/// A field through which a TensorProto can be reached.
struct Child {
  Message parent;
  std::uint64_t number;
  Message message;
};
constexpr std::array<Child, 19> kChildren{{
    {Message::model, 7, Message::graph},
    {Message::model, 20, Message::training_info},
    {Message::model, 25, Message::function},
    {Message::training_info, 1, Message::graph},
    {Message::training_info, 2, Message::graph},
    {Message::graph, 1, Message::node},
    {Message::graph, 5, Message::tensor},
    {Message::graph, 15, Message::sparse_tensor},
    {Message::function, 7, Message::node},
    {Message::function, 11, Message::attribute},
    {Message::node, 5, Message::attribute},
    {Message::attribute, 5, Message::tensor},
    {Message::attribute, 6, Message::graph},
    {Message::attribute, 10, Message::tensor},
    {Message::attribute, 11, Message::graph},
    {Message::attribute, 22, Message::sparse_tensor},
    {Message::attribute, 23, Message::sparse_tensor},
    {Message::sparse_tensor, 1, Message::tensor},
    {Message::sparse_tensor, 2, Message::tensor},
}};

std::optional<Message> child_of(Message parent, std::uint64_t number) {
  for (const Child& child : kChildren) {
    if (child.parent == parent && child.number == number) return child.message;
  }
  return std::nullopt;
}

/// The bytes are not what a protobuf writer produces.
class WireError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Field {
  std::uint64_t number = 0;
  std::uint64_t wire_type = 0;
  std::uint64_t value = 0;  // of a varint; else the length of what follows
};

/// Reads protobuf fields; never past the end it is given, and never trusts a declared length.
class WireReader {
 public:
  explicit WireReader(const RegularFile& file) : file_(file) {}

  std::uint64_t offset() const noexcept { return offset_; }
  void skip_to(std::uint64_t offset) noexcept { offset_ = offset; }

  /// The next field before end. A length has been checked against end.
  Field field(std::uint64_t end) {
    const std::uint64_t tag = varint(end);
    Field field;
    field.number = tag >> 3U;
    field.wire_type = tag & 7U;
    if (tag > 0xFFFFFFFFU || field.number == 0) throw WireError("impossible field tag " + std::to_string(tag));
    if (field.wire_type == kVarint || field.wire_type == kBytes) {
      field.value = varint(end);
    } else if (field.wire_type == kFixed64 || field.wire_type == kFixed32) {
      field.value = field.wire_type == kFixed64 ? 8 : 4;
    } else {
      throw WireError("unsupported wire type " + std::to_string(field.wire_type) + " in field " +
                      std::to_string(field.number));
    }
    if (field.wire_type != kVarint && field.value > end - offset_) {
      throw WireError("field " + std::to_string(field.number) + " claims " + std::to_string(field.value) + " bytes, " +
                      std::to_string(end - offset_) + " are left");
    }
    return field;
  }

  /// A short UTF-8 string.
  std::string text(std::uint64_t length) {
    if (length > kMaxString) {
      throw WireError("a name or path of " + std::to_string(length) + " bytes (at most " + std::to_string(kMaxString) +
                      " are allowed)");
    }
    std::string content(static_cast<std::size_t>(length), '\0');
    const std::size_t got = file_.read(content.data(), content.size(), offset_);
    offset_ += got;
    if (got != content.size()) throw WireError("the file ends inside a string");
    if (first_invalid_utf8(content) != std::string_view::npos) throw WireError("a name or path that is not UTF-8");
    return content;
  }

 private:
  std::uint64_t varint(std::uint64_t end) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 70; shift += 7) {
      const std::optional<unsigned char> byte = offset_ < end ? next() : std::nullopt;
      if (!byte) throw WireError("the file ends inside a number");
      ++offset_;
      value |= static_cast<std::uint64_t>(*byte & 0x7FU) << shift;  // bits beyond 64 fall off, as in protobuf
      if (*byte < 0x80) return value;
    }
    throw WireError("a number is longer than 10 bytes");
  }

  /// The byte at offset_; unset at the end of the file.
  std::optional<unsigned char> next() {
    if (offset_ < block_start_ || offset_ >= block_start_ + block_size_) {
      block_start_ = offset_;
      block_size_ = file_.read(block_.data(), block_.size(), offset_);
      if (block_size_ == 0) return std::nullopt;
    }
    return block_[static_cast<std::size_t>(offset_ - block_start_)];
  }

  const RegularFile& file_;
  std::uint64_t offset_ = 0;
  std::array<unsigned char, 4096> block_{};
  std::uint64_t block_start_ = 0;
  std::size_t block_size_ = 0;
};

/// Calls visit(field) for every field up to end and skips what it leaves unread.
template <typename Visit>
void for_each_field(WireReader& reader, std::uint64_t end, Visit visit) {
  while (reader.offset() < end) {
    const Field field = reader.field(end);
    const std::uint64_t after = reader.offset() + (field.wire_type == kVarint ? 0 : field.value);
    visit(field);
    reader.skip_to(after);
  }
}

ExternalTensor entry_of(WireReader& reader, std::uint64_t end) {  // a StringStringEntryProto: key, value
  ExternalTensor entry;
  for_each_field(reader, end, [&](const Field& field) {
    if (field.wire_type != kBytes) return;
    if (field.number == kEntryKey) entry.tensor = reader.text(field.value);
    if (field.number == kEntryValue) entry.location = reader.text(field.value);
  });
  return entry;
}

void collect_tensor(WireReader& reader, std::uint64_t end, std::vector<ExternalTensor>& found) {
  std::string name;
  bool external = false;
  std::vector<std::string> locations;
  for_each_field(reader, end, [&](const Field& field) {
    if (field.number == kTensorName && field.wire_type == kBytes) {
      name = reader.text(field.value);
    } else if (field.number == kTensorDataLocation && field.wire_type == kVarint) {
      external = field.value == kExternal;
    } else if (field.number == kTensorExternalData && field.wire_type == kBytes) {
      ExternalTensor entry = entry_of(reader, reader.offset() + field.value);
      if (entry.tensor == "location") locations.push_back(std::move(entry.location));
    }
  });
  if (external && locations.empty()) {
    throw WireError("tensor " + in_quotes(name) + " is external but names no location");
  }
  // A location counts even where data_location says "inline": runtimes differ in which of the two they obey.
  for (std::string& location : locations) found.push_back({name, std::move(location)});
}

void collect(WireReader& reader, Message message, std::uint64_t end, int depth, std::vector<ExternalTensor>& found) {
  if (depth > kMaxDepth) throw WireError("messages nested more than " + std::to_string(kMaxDepth) + " deep");
  for_each_field(reader, end, [&](const Field& field) {
    const std::optional<Message> child = child_of(message, field.number);
    if (!child || field.wire_type != kBytes) return;
    const std::uint64_t child_end = reader.offset() + field.value;
    if (*child == Message::tensor) {
      collect_tensor(reader, child_end, found);
    } else {
      collect(reader, *child, child_end, depth + 1, found);
    }
  });
}

void collect_file(const RegularFile& file, const std::string& path, std::vector<ExternalTensor>& found) {
  const std::uint64_t size = file.state().size;
  WireReader reader(file);
  try {
    collect(reader, Message::model, size, 0, found);
  } catch (const WireError& error) {
    throw Error(ErrorKind::bundle, path + " is not a usable ONNX file: " + error.what() + " at byte " +
                                       std::to_string(reader.offset()) + " of " + std::to_string(size) +
                                       "; build the bundle again");
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "cannot read the graph " + path + ": " + error.what());
  }
}

}  // namespace

std::vector<ExternalTensor> external_tensors(const RegularFile& file, const std::string& path) {
  std::vector<ExternalTensor> found;
  collect_file(file, path, found);
  return found;
}

}  // namespace crt
