#include "bundle/json.hpp"

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

constexpr std::size_t kShownCharacters = 200;

/// Builds the value from nlohmann's events. Its own tree would neither keep the order nor refuse duplicate keys.
class Builder {
 public:
  JsonValue take() { return std::move(result_); }
  const std::string& problem() const noexcept { return problem_; }

  bool null() { return add(JsonValue()); }
  bool boolean(bool value) { return add(JsonValue(value)); }
  bool number_integer(std::int64_t value) { return add(JsonValue(value)); }
  bool number_unsigned(std::uint64_t value) {
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) return refuse_integer();
    return add(JsonValue(static_cast<std::int64_t>(value)));
  }
  bool number_float(double value, const std::string& text) {
    if (text.find_first_of(".eE") == std::string::npos) return refuse_integer();
    return add(JsonValue(value));
  }
  bool string(std::string& value) { return add(JsonValue(std::move(value))); }
  bool binary(const nlohmann::json::binary_t&) { return refuse("is not JSON (binary data)"); }
  bool key(std::string& value) {
    open_.back().key = std::move(value);
    return true;
  }
  bool start_object(std::size_t) { return open(true); }
  bool start_array(std::size_t) { return open(false); }
  bool end_object() {
    std::optional<JsonValue> value;
    try {
      value.emplace(JsonObject(std::move(open_.back().members)));
    } catch (const JsonError& error) {
      return refuse(error.what());
    }
    open_.pop_back();
    return add(std::move(*value));
  }
  bool end_array() {
    JsonValue value(std::move(open_.back().items));
    open_.pop_back();
    return add(std::move(value));
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception& error) {
    const std::string text = error.what();  // "[json.exception.parse_error.101] parse error at line 1, ..."
    const std::size_t start = text.find("] ");
    const std::string reason = start == std::string::npos ? text : text.substr(start + 2);
    return refuse("is not JSON (" + first_characters(reason, kShownCharacters) + ")");
  }

 private:
  struct Open {
    bool is_object = false;
    std::string key;
    std::vector<JsonMember> members;
    JsonArray items;
  };

  bool open(bool is_object) {
    if (open_.size() >= kMostJsonLevels) {
      return refuse("is nested too deeply (more than " + std::to_string(kMostJsonLevels) + " levels)");
    }
    open_.emplace_back();
    open_.back().is_object = is_object;
    return true;
  }
  bool add(JsonValue value) {
    if (open_.empty()) {
      result_ = std::move(value);
    } else if (open_.back().is_object) {
      open_.back().members.emplace_back(std::move(open_.back().key), std::move(value));
    } else {
      open_.back().items.push_back(std::move(value));
    }
    return true;
  }
  bool refuse(std::string problem) {
    problem_ = std::move(problem);
    return false;
  }
  bool refuse_integer() { return refuse("is not JSON (a whole number is beyond 64 bits)"); }

  std::vector<Open> open_;
  JsonValue result_;
  std::string problem_;
};

}  // namespace

JsonObject::JsonObject(std::vector<JsonMember> members) : members_(std::move(members)), sorted_(members_.size()) {
  std::iota(sorted_.begin(), sorted_.end(), std::size_t{0});
  const auto key = [this](std::size_t index) -> const std::string& { return members_[index].first; };
  std::sort(sorted_.begin(), sorted_.end(), [&key](std::size_t a, std::size_t b) {
    const int order = key(a).compare(key(b));
    return order != 0 ? order < 0 : a < b;
  });
  std::size_t twice = members_.size();
  for (std::size_t i = 1; i < sorted_.size(); ++i) {
    if (key(sorted_[i - 1]) == key(sorted_[i])) twice = std::min(twice, sorted_[i - 1]);
  }
  if (twice < members_.size()) {
    throw JsonError("is not JSON (the key " + in_quotes(key(twice), kShownCharacters) + " stands twice in one object)");
  }
}

const JsonValue* JsonObject::find(std::string_view key) const noexcept {
  const auto less = [this](std::size_t index, std::string_view wanted) { return members_[index].first < wanted; };
  const auto found = std::lower_bound(sorted_.begin(), sorted_.end(), key, less);
  return found != sorted_.end() && members_[*found].first == key ? &members_[*found].second : nullptr;
}

JsonValue::JsonValue(JsonArray value) : value_(std::make_unique<JsonArray>(std::move(value))) {}
JsonValue::JsonValue(JsonObject value) : value_(std::make_unique<JsonObject>(std::move(value))) {}
JsonValue::JsonValue(JsonValue&&) noexcept = default;
JsonValue& JsonValue::operator=(JsonValue&&) noexcept = default;
JsonValue::~JsonValue() = default;

const JsonValue& JsonValue::at(std::string_view key) const {
  const JsonValue* value = find(key);
  if (value == nullptr) throw std::out_of_range("no member " + std::string(key));
  return *value;
}

JsonValue parse_json(std::string_view text) {
  const std::size_t invalid = first_invalid_utf8(text);
  if (invalid != std::string_view::npos) throw JsonError("is not UTF-8 (byte " + std::to_string(invalid) + ")");
  if (text.substr(0, 3) == "\xEF\xBB\xBF") throw JsonError("is not JSON (it starts with a byte order mark)");
  // nlohmann takes a NUL for the end of the text and whatever follows for nothing.
  const std::size_t nul = text.find('\0');
  if (nul != std::string_view::npos) throw JsonError("is not JSON (a NUL at byte " + std::to_string(nul) + ")");
  Builder builder;
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &builder)) throw JsonError(builder.problem());
  return builder.take();
}

}  // namespace crt
