// The reader that finds every file an ONNX graph points at, whatever the bytes are.
#include <doctest/doctest.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "bundle/external_data.hpp"
#include "bundle_folder.hpp"

namespace {

using crt_test::BundleFolder;
using crt_test::external_tensor;
using crt_test::model_with;
using crt_test::proto_bytes;
using crt_test::proto_number;
using crt_test::proto_varint;

std::string stored(const BundleFolder& bundle, const std::string& content) {
  const std::string path = (bundle.path() / "m.onnx").string();
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

std::vector<std::string> locations(const BundleFolder& bundle, const std::string& content) {
  std::vector<std::string> found;
  const std::string path = stored(bundle, content);
  for (const crt::ExternalTensor& tensor : crt::external_tensors(crt::RegularFile(path), path)) {
    found.push_back(tensor.location);
  }
  return found;
}

}  // namespace

TEST_CASE("external data: tensors are found wherever ONNX allows them") {
  const BundleFolder bundle;
  const auto tensor = [](const std::string& location) { return external_tensor("t", location); };
  const auto node = [](const std::string& attribute) { return proto_bytes(1, proto_bytes(5, attribute)); };
  const std::string body = proto_bytes(5, tensor("subgraph"));
  const std::string graph =
      proto_bytes(5, tensor("initializer")) +
      proto_bytes(15, proto_bytes(1, tensor("sparse-values")) + proto_bytes(2, tensor("sparse-indices"))) +
      node(proto_bytes(5, tensor("attribute"))) + node(proto_bytes(10, tensor("attribute-list"))) +
      node(proto_bytes(22, proto_bytes(1, tensor("attribute-sparse")))) +
      node(proto_bytes(23, proto_bytes(1, tensor("attribute-sparse-list")))) + node(proto_bytes(6, body)) +
      node(proto_bytes(11, body));
  const std::string function = proto_bytes(7, proto_bytes(5, proto_bytes(6, body))) +
                               proto_bytes(11, proto_bytes(5, tensor("function-default")));
  const std::string model = proto_bytes(7, graph) + proto_bytes(25, function) +
                            proto_bytes(20, proto_bytes(1, body) + proto_bytes(2, body));
  CHECK(locations(bundle, model) ==
        std::vector<std::string>{"initializer", "sparse-values", "sparse-indices", "attribute", "attribute-list",
                                 "attribute-sparse", "attribute-sparse-list", "subgraph", "subgraph", "subgraph",
                                 "function-default", "subgraph", "subgraph"});
}

TEST_CASE("external data: every location counts, also where the tensor says it is inline") {
  const BundleFolder bundle;
  const std::string two = proto_bytes(13, proto_bytes(1, "location") + proto_bytes(2, "harmless")) +
                          proto_bytes(13, proto_bytes(2, "../harmful") + proto_bytes(1, "location"));
  CHECK(locations(bundle, model_with(two)) == std::vector<std::string>{"harmless", "../harmful"});
  CHECK(locations(bundle, model_with(proto_bytes(8, "inline") + proto_bytes(9, std::string(64, 'x')))).empty());
  CHECK(locations(bundle, "").empty());
}

TEST_CASE("external data: hostile bytes are refused") {
  const BundleFolder bundle;
  const std::uint64_t huge = std::uint64_t{1} << 62U;
  std::string deep;
  for (int i = 0; i < 100; ++i) deep = proto_bytes(1, proto_bytes(5, proto_bytes(6, deep)));
  const std::vector<std::pair<std::string, std::string>> cases{
      {proto_varint(7 << 3 | 2) + proto_varint(huge), "field 7 claims 4611686018427387904 bytes, 0 are left"},
      {proto_varint(7 << 3 | 2) + proto_varint(~std::uint64_t{0}), "claims 18446744073709551615 bytes"},
      {proto_bytes(7, proto_varint(5 << 3 | 2) + proto_varint(1 << 20)) + std::string(1000, '\x08'),
       "claims 1048576 bytes, 0 are left"},
      {model_with(proto_bytes(13, proto_bytes(1, "location") + proto_bytes(2, std::string(2000000, 'x')))),
       "a name or path of 2000000 bytes (at most 4096 are allowed)"},
      {model_with(proto_bytes(8, "\xff\xfe")), "not UTF-8"},
      {model_with(proto_bytes(8, "w") + proto_number(14, 1)), "tensor 'w' is external but names no location"},
      {std::string(11, '\xff'), "longer than 10 bytes"},
      {"\x80", "ends inside a number"},
      {proto_varint(std::uint64_t{1} << 40U), "impossible field tag"},
      {std::string(2, '\0'), "impossible field tag 0"},
      {"\x0b\x0c", "unsupported wire type 3 in field 1"},
      {"this is not a protobuf", "is not a usable ONNX file"},
      {proto_bytes(7, deep), "nested more than 100 deep"},
  };
  for (const auto& [content, message] : cases) {
    const std::string path = stored(bundle, content);
    const std::string found = crt_test::refusal([&path = path] { crt::external_tensors(crt::RegularFile(path), path); });
    INFO(found);
    CHECK(found.find(message) != std::string::npos);
    CHECK(found.find(path + " is not a usable ONNX file: ") == 0);
  }
}

TEST_CASE("external data: large inline data is skipped, not read") {
  const BundleFolder bundle;
  const std::uint64_t size = std::uint64_t{1} << 40U;
  const std::string raw = proto_varint(9 << 3 | 2) + proto_varint(size);
  const std::string tensor = proto_varint(5 << 3 | 2) + proto_varint(raw.size() + size) + raw;
  const std::string after = proto_bytes(5, external_tensor("late", "after.weights"));
  const std::string path =
      stored(bundle, proto_varint(7 << 3 | 2) + proto_varint(tensor.size() + size + after.size()) + tensor);
  std::filesystem::resize_file(path, std::filesystem::file_size(path) + size);  // a hole: takes no room
  std::ofstream(path, std::ios::binary | std::ios::app) << after;
  const std::vector<crt::ExternalTensor> found = crt::external_tensors(crt::RegularFile(path), path);
  REQUIRE(found.size() == 1);
  CHECK(found[0].location == "after.weights");
}

TEST_CASE("external data: damaged and truncated graphs end in a list or an error") {
  const BundleFolder bundle;
  const std::string model = model_with(external_tensor("w", "a")) +
                            proto_bytes(7, proto_bytes(1, proto_bytes(5, proto_bytes(5, external_tensor("v", "b")))));
  std::mt19937 generator(0);
  int refused = 0;
  for (int round = 0; round < 400; ++round) {
    std::string content = model.substr(0, round % 4 == 0 ? generator() % model.size() : model.size());
    for (unsigned i = 0; i < 1 + generator() % 2 && !content.empty(); ++i) {
      content[generator() % content.size()] = static_cast<char>(generator() % 256);
    }
    refused += crt_test::refusal([&] { locations(bundle, content); }).empty() ? 0 : 1;
  }
  CHECK(refused > 50);
  CHECK(refused < 400);
}
