// A small bundle in a temporary folder: one graph with external weights, a TensorRT engine, and their manifest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "crt_runtime/error.hpp"

namespace crt_test {

using Json = nlohmann::ordered_json;

/// Kind and text of the Error that action throws; "" if it throws none.
std::string refusal(const std::function<void()>& action, crt::ErrorKind kind = crt::ErrorKind::bundle);

/// The model of a BundleFolder and its contract; of one without states where it is not iterated.
Json model_of(bool iterated);
Json contract_of(bool iterated);

/// One protobuf field: a varint, or bytes with their length.
std::string proto_varint(std::uint64_t value);
std::string proto_number(std::uint64_t field, std::uint64_t value);
std::string proto_bytes(std::uint64_t field, const std::string& payload);
/// A TensorProto whose data lies at location.
std::string external_tensor(const std::string& name, const std::string& location);
/// A ModelProto with one initializer.
std::string model_with(const std::string& tensor);

/// Its folder is removed with it.
class BundleFolder {
 public:
  /// location: where the graph's weight lies.
  explicit BundleFolder(const std::string& location = "fp32.weights");
  ~BundleFolder();
  BundleFolder(const BundleFolder&) = delete;
  BundleFolder& operator=(const BundleFolder&) = delete;

  /// The bundle; its parent is this test's own folder.
  std::filesystem::path path() const { return parent_ / "demo"; }
  std::string text() const { return path().string(); }

  Json manifest;
  /// Write a file of the bundle and list it in manifest, which write_manifest() then stores.
  void write(const std::string& name, const std::string& content);
  void write_manifest() const;
  /// What write_manifest() stores: the manifest with its digests.
  std::string manifest_text() const;
  /// Store these bytes as manifest.json.
  void write_manifest(const std::string& content) const;

 private:
  std::filesystem::path parent_;
};

}  // namespace crt_test
