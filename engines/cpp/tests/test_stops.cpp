// Stop strings in text that arrives in pieces.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "generation/row_text.hpp"

namespace {

struct Result {
  std::string text;
  bool found;
};

bool operator==(const Result& left, const Result& right) {
  return left.text == right.text && left.found == right.found;
}

Result passed(const std::vector<std::string>& stops, const std::vector<std::string>& pieces) {
  crt::StopMatcher matcher(stops);
  std::string text;
  for (const std::string& piece : pieces) matcher.push(piece, text);
  matcher.finish(text);
  return {text, matcher.found()};
}

/// Every way to cut a text into pieces.
std::vector<std::vector<std::string>> cuts(const std::string& text) {
  std::vector<std::vector<std::string>> all;
  for (unsigned mask = 0; mask < 1U << (text.size() - 1); ++mask) {
    std::vector<std::string> pieces = {""};
    for (std::size_t index = 0; index < text.size(); ++index) {
      pieces.back() += text[index];
      if ((mask >> index & 1U) != 0) pieces.emplace_back();
    }
    all.push_back(pieces);
  }
  return all;
}

}  // namespace

TEST_CASE("stops: the result does not depend on how the text is cut") {
  struct Case {
    std::vector<std::string> stops;
    std::string text;
    Result expected;
  };
  const std::vector<Case> cases = {
      {{"END"}, "abENDcd", {"ab", true}},
      {{"END"}, "abENcdEN", {"abENcdEN", false}},
      {{"aab"}, "aaaab", {"aa", true}},
      {{"abab", "bc"}, "xababc", {"x", true}},
      {{"abcd", "bc"}, "xabcd", {"xa", true}},   // complete first
      {{"c", "abc", "bc"}, "xabcd", {"x", true}},  // the longest of those complete together
      {{"ab", "abc"}, "xabc", {"x", true}},
      {{"xabc"}, "xxabxabc", {"xxab", true}},
  };
  for (const Case& each : cases) {
    for (const auto& pieces : cuts(each.text)) CHECK(passed(each.stops, pieces) == each.expected);
  }
}

TEST_CASE("stops: only what may become a stop string is held back") {
  crt::StopMatcher matcher({"END", "\xC3\xA9!"});
  std::string text;
  matcher.push("abE", text);
  CHECK(text == "ab");
  matcher.push("N", text);
  CHECK(text == "ab");
  matcher.push("x", text);
  CHECK(text == "abENx");
  matcher.push("\xC3\xA9", text);
  CHECK(text == "abENx");
  matcher.push("\xC3\xA9", text);
  CHECK(text == "abENx\xC3\xA9");
  matcher.finish(text);
  CHECK(text == "abENx\xC3\xA9\xC3\xA9");
  CHECK(!matcher.found());
}

TEST_CASE("stops: a look at how the text would end changes nothing") {
  crt::StopMatcher matcher({"END", "!"});
  std::string text;
  matcher.push("abEN", text);
  CHECK(matcher.held() == "EN");
  CHECK(matcher.before_a_stop("ENx!y") == "ENx");
  CHECK(matcher.before_a_stop(matcher.held()) == "EN");
  matcher.push("D", text);
  CHECK(text == "ab");
  CHECK(matcher.found());
  CHECK(matcher.held().empty());
}

TEST_CASE("stops: nothing comes after a stop string, and without any everything passes at once") {
  CHECK(passed({"!"}, {"a!b", "c", "!"}) == Result{"a", true});
  crt::StopMatcher none({});
  std::string text;
  none.push("abc", text);
  CHECK(text == "abc");
}
