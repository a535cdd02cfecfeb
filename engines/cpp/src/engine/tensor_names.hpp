// Names of the graphs and of their tensors. Generated from graphs/*.toml by engines/cpp/scripts/tensor_names.py:
// change those files and run the script.
#pragma once

#include <cstddef>
#include <string>

namespace crt::names {

// --- graphs
inline constexpr char kGraphHead[] = "head";
inline constexpr char kGraphPrefill[] = "prefill";
inline constexpr char kGraphPrefillPass[] = "prefill_pass";
inline constexpr char kGraphStep[] = "step";

// --- tensors
inline constexpr char kHidden[] = "hidden";
inline constexpr char kLogits[] = "logits";
inline constexpr char kInputIds[] = "input_ids";
inline constexpr char kLength[] = "length";
inline constexpr char kPosition[] = "position";
inline constexpr char kNextToken[] = "next_token";
inline constexpr char kNextPosition[] = "next_position";
inline constexpr char kNextHidden[] = "next_hidden";
inline constexpr char kResidual[] = "residual";

// --- tensors of one cache
inline std::string past_key_values_key(std::size_t index) {
  return "past_key_values." + std::to_string(index) + ".key";
}
inline std::string past_key_values_value(std::size_t index) {
  return "past_key_values." + std::to_string(index) + ".value";
}
inline std::string present_key_values_key(std::size_t index) {
  return "present_key_values." + std::to_string(index) + ".key";
}
inline std::string present_key_values_value(std::size_t index) {
  return "present_key_values." + std::to_string(index) + ".value";
}

// --- tensors of one state
inline std::string state(const std::string& name) {
  return name == kHidden ? "state" : "state." + name;
}
inline std::string iterate(const std::string& name) {
  return name == kHidden ? "hidden" : "iterate." + name;
}
inline std::string next_state(const std::string& name) {
  return name == kHidden ? "next_state" : "next_state." + name;
}
inline std::string next_iterate(const std::string& name) {
  return name == kHidden ? "next_hidden" : "next_iterate." + name;
}

}  // namespace crt::names
