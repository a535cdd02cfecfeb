#include "bundle/json_rules.hpp"

#include <algorithm>
#include <iterator>
#include <sstream>

#include "text/messages.hpp"

namespace crt {
namespace {

unsigned type_of(const JsonValue& value) {
  if (value.is_object()) return kObject;
  if (value.is_array()) return kList;
  if (value.is_string()) return kText;
  if (value.is_integer()) return kInteger;
  if (value.is_boolean()) return kBoolean;
  return value.is_null() ? kNull : kFraction;
}

/// Limits are whole numbers.
std::string number_text(double number) { return std::to_string(static_cast<std::int64_t>(number)); }

/// "an integer of 1 to 1024 or null".
std::string expectation(const MemberRule& rule) {
  if (rule.words != nullptr) return std::string("one of ") + rule.words;
  std::string number = (rule.types & kFraction) != 0 ? "a number" : "an integer";
  const bool bounded = rule.most < std::numeric_limits<double>::infinity();
  if (rule.least == kAboveZero) {
    number += " above 0";
  } else if (rule.least > -std::numeric_limits<double>::infinity()) {
    number += " of at least " + number_text(rule.least);
  }
  if (bounded) number += " and at most " + number_text(rule.most);
  std::vector<std::string> parts;
  if ((rule.types & kObject) != 0) parts.emplace_back("an object");
  if ((rule.types & kList) != 0) parts.emplace_back("a list");
  if ((rule.types & kText) != 0) parts.emplace_back("a text");
  if ((rule.types & kNumber) != 0) parts.push_back(number);
  if ((rule.types & kBoolean) != 0) parts.emplace_back("true or false");
  if ((rule.types & kNull) != 0) parts.emplace_back("null");
  return joined(parts, " or ");
}

bool holds(const MemberRule& rule, const JsonValue& value) {
  if ((type_of(value) & rule.types) == 0) return false;
  if (value.is_number()) return value.number() >= rule.least && value.number() <= rule.most;
  return rule.words == nullptr || !value.is_string() || is_word(rule.words, value.string());
}

}  // namespace

std::vector<std::string> rule_problems(const std::string& where, const JsonValue& value, const MemberRules& rules,
                                       Unknown unknown) {
  if (!value.is_object()) return {where + " must be an object, found " + shown(value)};
  std::vector<std::string> problems;
  for (const MemberRule& rule : rules) {
    const JsonValue* found = value.find(rule.name);
    if (found == nullptr) {
      if ((rule.types & kOptional) == 0) problems.push_back(where + " lacks '" + rule.name + "'");
    } else if (!holds(rule, *found)) {
      problems.push_back(where + ": '" + rule.name + "' must be " + expectation(rule) + ", found " + shown(*found));
    }
  }
  if (unknown == Unknown::accepted) return problems;
  for (const JsonMember& member : value.object().members()) {
    const auto is_known = [&](const MemberRule& rule) { return rule.name == member.first; };
    if (std::none_of(rules.begin(), rules.end(), is_known)) {
      problems.push_back(where + " has the unknown key " + in_quotes(member.first));
    }
  }
  return problems;
}

bool check_rules(std::vector<std::string>& problems, const std::string& where, const JsonValue& value,
                 const MemberRules& rules, Unknown unknown) {
  std::vector<std::string> broken = rule_problems(where, value, rules, unknown);
  const bool valid = broken.empty();
  problems.insert(problems.end(), std::make_move_iterator(broken.begin()), std::make_move_iterator(broken.end()));
  return valid;
}

bool is_word(const char* words, const std::string& text) {
  std::istringstream stream(words);
  for (std::string word; stream >> word;) {
    if (word == text) return true;
  }
  return false;
}

const JsonValue* given(const JsonValue& object, const char* name) noexcept {
  const JsonValue* value = object.find(name);
  return value == nullptr || value->is_null() ? nullptr : value;
}

}  // namespace crt
