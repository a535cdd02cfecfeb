// The reader of JSON files, strict and bounded, and what messages show of them.
#include <doctest/doctest.h>

#include <optional>
#include <string>
#include <vector>

#include "bundle/json.hpp"
#include "bundle/json_rules.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/terminal.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace {

std::string problem_of(const std::string& text) {
  try {
    crt::parse_json(text);
  } catch (const crt::JsonError& error) {
    return error.what();
  }
  return "";
}

bool refused(const std::string& text, const std::string& reason) {
  const std::string problem = problem_of(text);
  INFO(problem);
  return problem.find(reason) != std::string::npos;
}

}  // namespace

TEST_CASE("json: values keep their type and members their order") {
  const crt::JsonValue value = crt::parse_json(R"({"b": [1, -2, 1.5, true, null, "x\u00e4"], "a": {}, "": 1e3})");
  const std::vector<crt::JsonMember>& members = value.object().members();
  REQUIRE(members.size() == 3);
  CHECK(members[0].first == "b");
  CHECK(members[1].first == "a");
  const crt::JsonArray& items = value.at("b").array();
  CHECK(items[0].integer() == 1);
  CHECK(items[1].integer() == -2);
  CHECK_FALSE(items[2].is_integer());
  CHECK(items[2].number() == 1.5);
  CHECK_FALSE(items[3].is_integer());
  CHECK(items[4].is_null());
  CHECK(items[5].string() == "x\xC3\xA4");
  CHECK_FALSE(value.at("").is_integer());
  CHECK(value.find("c") == nullptr);
  CHECK(items[0].find("a") == nullptr);
}

TEST_CASE("json: whole numbers are 64 bits, others finite") {
  CHECK(crt::parse_json("9223372036854775807").integer() == 9223372036854775807LL);
  CHECK(crt::parse_json("-9223372036854775808").integer() == -9223372036854775807LL - 1);
  for (const char* text : {"9223372036854775808", "18446744073709551615", "-9223372036854775809"}) {
    CHECK(refused(text, "beyond 64 bits"));
  }
  CHECK(refused("[" + std::string(10000, '9') + "]", "is not JSON"));
  CHECK(refused("1e999", "is not JSON"));
  for (const char* text : {"NaN", "Infinity", "-Infinity", "01", "1.", "+1", "0x1"}) {
    CHECK(refused(text, "is not JSON"));
  }
}

TEST_CASE("json: a NUL ends no text") {
  for (const std::string& text : {std::string("{}\0", 3), std::string("{}\0x", 4), std::string("\0{}", 3),
                                 std::string("{\0}", 3), std::string("\"a\0b\"", 5), std::string("1\0", 2)}) {
    CHECK(refused(text, "is not JSON (a NUL at byte "));
  }
  CHECK(crt::parse_json(R"("a\u0000b")").string() == std::string("a\0b", 3));
}

TEST_CASE("json: no key twice in one object") {
  CHECK(refused(R"({"a": 1, "b": 2, "a": 1})", "the key 'a' stands twice in one object"));
  CHECK(refused(R"([{"x": {"a\u0062": 1, "ab": 1}}])", "the key 'ab' stands twice"));
  CHECK(problem_of(R"({"a": {"a": 1}, "b": {"a": 1}})").empty());
}

TEST_CASE("json: nesting is bounded") {
  const auto nested = [](std::size_t levels) { return std::string(levels, '[') + std::string(levels, ']'); };
  CHECK(problem_of(nested(crt::kMostJsonLevels)).empty());
  CHECK(refused(nested(crt::kMostJsonLevels + 1), "nested too deeply"));
  CHECK(refused(std::string(5000000, '['), "nested too deeply"));
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"a\":";
  CHECK(refused(objects, "nested too deeply"));
}

TEST_CASE("json: text is strict UTF-8") {
  struct Case {
    std::string text;
    std::size_t at;
  };
  const std::vector<Case> cases{{"\xff\xfe{}", 0},         {"\"\x80\"", 1},          {"\"a\xC0\x80\"", 2},
                                {"\"\xE0\x80\x80\"", 1},   {"\"\xED\xA0\x80\"", 1},  {"\"\xF4\x90\x80\x80\"", 1},
                                {"\"\xF0\x80\x80\x80\"", 1}, {"\"\xE2\x82\"", 1},    {"\"\xF5\x80\x80\x80\"", 1},
                                {"\"\xE2\x82", 1}};
  for (const Case& one : cases) {
    CHECK(crt::first_invalid_utf8(one.text) == one.at);
    CHECK(refused(one.text, "is not UTF-8 (byte " + std::to_string(one.at) + ")"));
  }
  CHECK(problem_of("\"\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF\"").empty());
  CHECK(refused("\xEF\xBB\xBF{}", "byte order mark"));
  CHECK(refused(R"("\ud800")", "is not JSON"));
  CHECK(refused("\"\n\"", "is not JSON"));
}

TEST_CASE("json: whatever is cut off is refused") {
  const std::string text = R"({"a": [1.5, "x", true], "b": null})";
  for (std::size_t length = 0; length < text.size(); ++length) CHECK_FALSE(problem_of(text.substr(0, length)).empty());
  CHECK_FALSE(problem_of(text + "x").empty());
  CHECK(problem_of(text + " \n").empty());
}

TEST_CASE("json: the message of a broken file stays short") {
  CHECK(problem_of("\"" + std::string(1000000, 'x') + "\n").size() < 400);
}

TEST_CASE("json: values are shown on one line, lists and objects by their size") {
  const auto show = [](const std::string& text) { return crt::shown(crt::parse_json(text)); };
  CHECK(show("null") == "null");
  CHECK(show("true") == "true");
  CHECK(show("-7") == "-7");
  CHECK(show("0.5") == "0.5");
  CHECK(show(R"(["a", {"b": 1}])") == "a list of 2");
  CHECK(show(R"({"b": 1})") == "an object of 1 members");
  CHECK(show(R"("\n\u0000\u007f")") == R"('\n\x00\x7f')");
  CHECK(show("\"" + std::string(100, 'x') + "\"") == "'" + std::string(80, 'x') + "'");
  const std::string euros = crt::first_characters("\xE2\x82\xAC\xE2\x82\xAC", 1);
  CHECK(euros == "\xE2\x82\xAC");
}

TEST_CASE("json rules: presence, types, ranges, words and unknown keys") {
  const crt::MemberRules rules{{"size", crt::kInteger, 1, 8},
                               {"bound", crt::kNumber | crt::kNull, crt::kAboveZero},
                               {"level", crt::kText | crt::kOptional, 0, 0, "low high"}};
  const auto problems = [&rules](const std::string& text) {
    const auto found = crt::rule_problems("it", crt::parse_json(text), rules, crt::Unknown::refused);
    return found.empty() ? "" : crt::joined(found, "; ");
  };
  CHECK(problems(R"({"size": 8, "bound": 1e-300, "level": "high"})").empty());
  CHECK(problems(R"({"size": 1, "bound": null})").empty());
  CHECK(problems("[]") == "it must be an object, found a list of 0");
  CHECK(problems("{}") == "it lacks 'size'; it lacks 'bound'");
  CHECK(problems(R"({"size": 9, "bound": 0})") ==
        "it: 'size' must be an integer of at least 1 and at most 8, found 9; "
        "it: 'bound' must be a number above 0 or null, found 0");
  CHECK(problems(R"({"size": true, "bound": 1, "level": "lo"})") ==
        "it: 'size' must be an integer of at least 1 and at most 8, found true; "
        "it: 'level' must be one of low high, found 'lo'");
  CHECK(problems(R"({"size": 1.0, "bound": 1, "sizes": 1})") ==
        "it: 'size' must be an integer of at least 1 and at most 8, found 1; it has the unknown key 'sizes'");
}

TEST_CASE("visible: control characters, changes of direction and what is no UTF-8 become escapes, nothing else does") {
  CHECK(crt::visible("a\tb\n\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80") == "a\tb\n\xC3\xA9\xE4\xB8\xAD\xF0\x9F\x98\x80");
  CHECK(crt::visible("\x1b[2J\x07\r\x7f") == "\\x1b[2J\\x07\\r\\x7f");
  CHECK(crt::visible("\xC2\x9b|\xC2\xA0") == "\\x9b|\xC2\xA0");
  CHECK(crt::visible("\xE2\x80\xAE\xE2\x81\xA9\xD8\x9C") == "\\u202e\\u2069\\u061c");
  CHECK(crt::visible("\x9b\xC2\xE2\x80\xC0\x9b") == "\\x9b\\xc2\\xe2\\x80\\xc0\\x9b");
  CHECK(std::string(crt::Error(crt::ErrorKind::input, "a\x1b").what()) == "a\\x1b");
}
