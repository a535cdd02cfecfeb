// What the members of a JSON object may be: a table of rules, checked in one place.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "bundle/json.hpp"

namespace crt {

// What a member may hold, as bits.
inline constexpr unsigned kObject = 1, kList = 2, kText = 4, kInteger = 8, kBoolean = 16, kNull = 32, kFraction = 64;
inline constexpr unsigned kNumber = kInteger | kFraction;
/// Of the same bits: it may be absent.
inline constexpr unsigned kOptional = 128;

/// As `least`: every number above 0.
inline constexpr double kAboveZero = std::numeric_limits<double>::denorm_min();

struct MemberRule {
  const char* name;
  unsigned types;                                            ///< bits
  double least = -std::numeric_limits<double>::infinity();   ///< of a number
  double most = std::numeric_limits<double>::infinity();     ///< of a number
  const char* words = nullptr;                               ///< texts that are allowed, with spaces between; null: any
};
using MemberRules = std::initializer_list<MemberRule>;

enum class Unknown { accepted, refused };

/// What is wrong with an object, which `where` names; empty if nothing is.
std::vector<std::string> rule_problems(const std::string& where, const JsonValue& value, const MemberRules& rules,
                                       Unknown unknown = Unknown::accepted);

/// As rule_problems, added to problems; true if there are none.
bool check_rules(std::vector<std::string>& problems, const std::string& where, const JsonValue& value,
                 const MemberRules& rules, Unknown unknown = Unknown::accepted);

/// Whether one of the words, which have spaces between them, is the text.
bool is_word(const char* words, const std::string& text);

/// A member that is there and not null; nullptr otherwise.
const JsonValue* given(const JsonValue& object, const char* name) noexcept;

}  // namespace crt
