// JSON as bundles and snapshots hold it: strict, bounded, object members in the order of the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace crt {

/// The text cannot be used; what() continues a sentence about it: "is not UTF-8 (byte 3)".
class JsonError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class JsonValue;
using JsonArray = std::vector<JsonValue>;
using JsonMember = std::pair<std::string, JsonValue>;

/// Members in file order, no key twice; find() takes O(log n).
class JsonObject {
 public:
  JsonObject() = default;
  /// Throws JsonError if a key stands twice.
  explicit JsonObject(std::vector<JsonMember> members);
  const std::vector<JsonMember>& members() const noexcept { return members_; }
  /// Null if there is no such member.
  const JsonValue* find(std::string_view key) const noexcept;

 private:
  std::vector<JsonMember> members_;
  std::vector<std::size_t> sorted_;  // indices of members_, by key
};

/// One value. 16 bytes: a hostile file of 64 MiB may hold thirty million of them.
class JsonValue {
 public:
  JsonValue() = default;  ///< null
  explicit JsonValue(bool value) : value_(value) {}
  explicit JsonValue(std::int64_t value) : value_(value) {}
  explicit JsonValue(double value) : value_(value) {}
  explicit JsonValue(std::string value) : value_(std::make_unique<std::string>(std::move(value))) {}
  explicit JsonValue(JsonArray value);
  explicit JsonValue(JsonObject value);
  JsonValue(JsonValue&&) noexcept;
  JsonValue& operator=(JsonValue&&) noexcept;
  ~JsonValue();

  bool is_null() const noexcept { return std::holds_alternative<std::monostate>(value_); }
  bool is_boolean() const noexcept { return std::holds_alternative<bool>(value_); }
  /// A number without fraction and exponent; true, 1.0 and 1e3 are no integers.
  bool is_integer() const noexcept { return std::holds_alternative<std::int64_t>(value_); }
  bool is_number() const noexcept { return is_integer() || std::holds_alternative<double>(value_); }
  bool is_string() const noexcept { return std::holds_alternative<std::unique_ptr<std::string>>(value_); }
  bool is_array() const noexcept { return std::holds_alternative<std::unique_ptr<JsonArray>>(value_); }
  bool is_object() const noexcept { return std::holds_alternative<std::unique_ptr<JsonObject>>(value_); }

  // Each throws std::bad_variant_access if the value has another type: check before.
  bool boolean() const { return std::get<bool>(value_); }
  std::int64_t integer() const { return std::get<std::int64_t>(value_); }
  double number() const { return is_integer() ? static_cast<double>(integer()) : std::get<double>(value_); }
  const std::string& string() const { return *std::get<std::unique_ptr<std::string>>(value_); }
  const JsonArray& array() const { return *std::get<std::unique_ptr<JsonArray>>(value_); }
  const JsonObject& object() const { return *std::get<std::unique_ptr<JsonObject>>(value_); }

  /// The member of an object; null if there is none or this is no object.
  const JsonValue* find(std::string_view key) const noexcept { return is_object() ? object().find(key) : nullptr; }
  /// The member of an object that is known to have it; throws std::out_of_range.
  const JsonValue& at(std::string_view key) const;

 private:
  std::variant<std::monostate, bool, std::int64_t, double, std::unique_ptr<std::string>, std::unique_ptr<JsonArray>,
               std::unique_ptr<JsonObject>>
      value_;
};

/// Deepest nesting that is read.
inline constexpr std::size_t kMostJsonLevels = 200;

/// Read one JSON document: strict UTF-8 without byte order mark, no duplicate keys, no NaN or Infinity, every whole
/// number within 64 bits signed, every other number finite, at most kMostJsonLevels deep. Throws JsonError.
JsonValue parse_json(std::string_view text);

}  // namespace crt
