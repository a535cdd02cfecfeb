// Names of the graphs and of their tensors. Generated from graphs/*.toml by engines/cpp/scripts/tensor_names.py:
// change those files and run the script.
#pragma once

#include <cstdint>
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
inline constexpr char kState[] = "state";
inline constexpr char kNextToken[] = "next_token";
inline constexpr char kNextPosition[] = "next_position";
inline constexpr char kNextState[] = "next_state";
inline constexpr char kNextHidden[] = "next_hidden";
inline constexpr char kResidual[] = "residual";

// --- tensors of one layer
inline std::string past_key_values_key(std::int64_t layer) {
  return "past_key_values." + std::to_string(layer) + ".key";
}
inline std::string past_key_values_value(std::int64_t layer) {
  return "past_key_values." + std::to_string(layer) + ".value";
}
inline std::string present_key_values_key(std::int64_t layer) {
  return "present_key_values." + std::to_string(layer) + ".key";
}
inline std::string present_key_values_value(std::int64_t layer) {
  return "present_key_values." + std::to_string(layer) + ".value";
}

}  // namespace crt::names
