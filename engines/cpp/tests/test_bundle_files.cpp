// A file of a bundle is opened as it was built or not at all.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "bundle_folder.hpp"
#include "tensorrt/tensorrt_sidecar.hpp"

namespace {

namespace fs = std::filesystem;
using crt_test::BundleFolder;
using crt_test::Json;
using crt_test::refusal;

constexpr char kGraph[] = "graphs/step.fp32.onnx";
constexpr char kWeights[] = "graphs/fp32.weights";

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

crt::BundleFiles open(const BundleFolder& bundle) { return crt::BundleFiles::open(bundle.text(), false); }

struct Damage {
  const char* name;
  std::function<void(const fs::path&)> act;
  const char* message;
  bool of_content = false;  // the file itself is changed, not what its name leads to
};

std::vector<Damage> damages() {
  const auto moved = [](const fs::path& path) { return path.parent_path() / "moved"; };
  return {
      {"one bit",
       [](const fs::path& path) {
         std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
         const char last = static_cast<char>((stream.seekg(-1, std::ios::end), stream.get()) ^ 1);
         stream.seekp(-1, std::ios::end).put(last);
       },
       "has SHA-256 ", true},
      {"longer", [](const fs::path& path) { std::ofstream(path, std::ios::app) << '!'; }, " bytes, the manifest says ", true},
      {"empty", [](const fs::path& path) { fs::resize_file(path, 0); }, "has 0 bytes, the manifest says ", true},
      {"missing", [](const fs::path& path) { fs::remove(path); }, "is missing"},
      {"link",
       [moved](const fs::path& path) {
         fs::rename(path, moved(path));
         fs::create_symlink("moved", path);
       },
       "goes through a link ('graphs/"},
      {"linked folder",
       [moved](const fs::path& path) {
         fs::rename(path.parent_path(), moved(path.parent_path()));
         fs::create_directory_symlink("moved", path.parent_path());
       },
       "goes through a link ('graphs')"},
      {"pipe",
       [](const fs::path& path) {
         fs::remove(path);
         REQUIRE(mkfifo(path.c_str(), 0600) == 0);
       },
       "is not a regular file"},
      {"folder",
       [](const fs::path& path) {
         fs::remove(path);
         fs::create_directory(path);
       },
       "is not a regular file"},
  };
}

}  // namespace

TEST_CASE("bundle files: a listed file comes back with its content, a graph with its weights") {
  const BundleFolder bundle;
  crt::BundleFiles files = open(bundle);
  CHECK(files.content("report.md", 5) == "first");
  CHECK(contains(refusal([&] { files.content("report.md", 4); }), "has more than 4 bytes"));
  const crt::HeldGraph graph = files.graph(kGraph);
  CHECK(graph.path == bundle.text() + "/" + kGraph);
  CHECK(graph.model == files.content(kGraph, 1000));
  REQUIRE(graph.weights.size() == 1);
  CHECK(graph.weights.at("fp32.weights").path == bundle.text() + "/" + kWeights);
  CHECK(graph.unchanged());
}

TEST_CASE("bundle files: damage is refused; what happens to the name of a file that is held open is no damage") {
  for (const char* name : {kGraph, kWeights}) {
    for (const Damage& damage : damages()) {
      const BundleFolder bundle;
      crt::BundleFiles opened_before = open(bundle);
      const std::string model = opened_before.graph(kGraph).model;
      damage.act(bundle.path() / name);
      crt::BundleFiles opened_after = open(bundle);
      for (crt::BundleFiles* files : {&opened_before, &opened_after}) {
        if (files == &opened_before && !damage.of_content) {
          CHECK(files->graph(kGraph).model == model);
          continue;
        }
        const std::string of_file = refusal([&] { files->held(name); });
        INFO(damage.name << ": " << of_file);
        CHECK(contains(of_file, "'" + std::string(name) + "' in " + bundle.text()));
        CHECK(contains(of_file, damage.message));
        CHECK(contains(refusal([&] { files->graph(kGraph); }), damage.message));
      }
    }
  }
}

TEST_CASE("bundle files: a bundle that was exchanged for another one stays what it was when it was opened") {
  BundleFolder bundle;
  BundleFolder other;
  other.write("report.md", "other");
  other.write(kWeights, std::string(64, 'x'));
  other.write_manifest();
  crt::BundleFiles files = open(bundle);
  const std::string identity = files.identity();
  const fs::path aside = bundle.path().parent_path() / "aside";
  fs::rename(bundle.path(), aside);
  fs::rename(other.path(), bundle.path());
  CHECK(files.content("report.md", 5) == "first");
  char first = 0;
  files.graph(kGraph).weights.at("fp32.weights").file->read(&first, 1, 0);
  CHECK(first == 'w');
  CHECK(open(bundle).identity() != identity);
  CHECK(open(bundle).content("report.md", 5) == "other");
  fs::remove_all(aside);  // as a build does with the bundle that it replaced
  CHECK(files.content("report.md", 5) == "first");
}

TEST_CASE("bundle files: another identity than the expected one is refused") {
  const BundleFolder bundle;
  const std::string identity = open(bundle).identity();
  CHECK(crt::BundleFiles::open(bundle.text(), false, identity).identity() == identity);
  const std::string found = refusal([&] { crt::BundleFiles::open(bundle.text(), false, std::string(64, '0')); });
  CHECK(contains(found, "expected the identity '" + std::string(64, '0') + "'"));
  CHECK(contains(found, "found " + identity));
}

TEST_CASE("bundle files: a table of files that was written anew is believed when every file proves it") {
  BundleFolder bundle;
  const std::string sealed = bundle.manifest_text();
  bundle.write("report.md", "repaired");
  Json repaired = Json::parse(sealed);
  repaired["files"] = bundle.manifest["files"];
  bundle.write_manifest(repaired.dump());
  CHECK(open(bundle).content("report.md", 100) == "repaired");
  std::ofstream(bundle.path() / "extra") << "x";
  CHECK(contains(refusal([&] { open(bundle); }), "'extra' is not listed in manifest.json"));
  fs::remove(bundle.path() / "extra");
  fs::resize_file(bundle.path() / kWeights, 3);
  CHECK(contains(refusal([&] { open(bundle); }), "'graphs/fp32.weights' has 3 bytes, the manifest says 64"));
  bundle.write_manifest(sealed);
  open(bundle);  // as written: files are checked when they are asked for
}

TEST_CASE("bundle files: a huge declared size is compared, not allocated") {
  BundleFolder bundle;
  bundle.manifest["files"]["report.md"]["size"] = 9223372036854775807LL;
  bundle.write_manifest();
  crt::BundleFiles files = open(bundle);
  CHECK(contains(refusal([&] { files.held("report.md"); }), "has 5 bytes, the manifest says 9223372036854775807"));
}

TEST_CASE("bundle files: what the manifest does not list stays closed") {
  const BundleFolder bundle;
  std::ofstream(bundle.path() / "extra") << "x";
  crt::BundleFiles files = open(bundle);
  for (const std::string& name : {std::string("extra"), std::string("../demo/report.md"), bundle.text() + "/report.md",
                                  std::string("manifest.json"), std::string("")}) {
    CHECK(contains(refusal([&] { files.held(name); }), "is not listed in the manifest"));
  }
  CHECK(contains(refusal([&] { files.graph("report.md"); }),
                 "'report.md' is not a graph of " + bundle.text() + "; its graphs are graphs/step.fp32.onnx"));
}

TEST_CASE("bundle files: external data outside the bundle is refused") {
  const std::vector<std::pair<std::string, std::string>> cases{
      {"/etc/passwd", "absolute path"},
      {"../report.md", "'..', which could lead out"},
      {"../../secret", "'..', which could lead out"},
      {"..\\secret", "contains '\\'"},
      {"C:secret", "no drive letter"},
      {std::string("fp32\0.weights", 13), "contains '\\x00'"},
      {"", "must have 1 to 1024 characters, has 0"},
      {"unlisted", "which is not listed in the manifest"},
  };
  for (const auto& [location, message] : cases) {
    const BundleFolder bundle(location);
    std::ofstream(bundle.path() / "graphs" / "unlisted") << "x";
    crt::BundleFiles files = open(bundle);
    const std::string found = refusal([&] { files.graph(kGraph); });
    INFO(found);
    CHECK(contains(found, "the external data of 'graphs/step.fp32.onnx' in " + bundle.text()));
    CHECK(contains(found, ": tensor 'w' points at "));
    CHECK(contains(found, message));
  }
}

TEST_CASE("bundle files: a graph that only a target names is checked through its external data") {
  BundleFolder bundle;
  bundle.manifest["graphs"] = Json::array();
  bundle.write_manifest();
  crt::BundleFiles files = open(bundle);
  files.graph(kGraph);
  fs::resize_file(bundle.path() / kWeights, 3);
  CHECK(contains(refusal([&] { files.held(kWeights); }), "has 3 bytes, the manifest says 64"));
  const std::string found = refusal([&] { open(bundle).graph(kGraph); });
  CHECK(contains(found, "tensor 'w' points at 'fp32.weights', which has 3 bytes"));
}

TEST_CASE("bundle files: the sidecar of an engine") {
  BundleFolder bundle;
  crt::BundleFiles files = open(bundle);
  const crt::EngineSidecar sidecar = crt::read_sidecar(files, "engines/rtx/step.engine");
  CHECK(sidecar.graph == "step");
  CHECK(sidecar.runtime_version == "1.7.1.4");
  CHECK(sidecar.compute_capability == std::optional<int>(80));
  CHECK(sidecar.capacity == 32);
  CHECK(sidecar.input_shapes.at("input_ids")[2] == crt::Shape{4, 1});
  CHECK(contains(refusal([&] { crt::read_sidecar(files, "report.md"); }), "its name must end in .engine"));
  CHECK(contains(refusal([&] { crt::read_sidecar(files, ""); }), "its name must end in .engine"));
  CHECK(contains(refusal([&] { crt::read_sidecar(files, "engines/other.engine"); }), "'engines/other.json' in"));
  std::ifstream stream(bundle.path() / "engines/rtx/step.json");
  const Json sound = Json::parse(stream);
  const auto refused = [&](const std::string& content, const std::string& message) {
    bundle.write("engines/rtx/step.json", content);
    bundle.write_manifest();
    crt::BundleFiles changed = open(bundle);
    const std::string found = refusal([&] { crt::read_sidecar(changed, "engines/rtx/step.engine"); });
    INFO(found);
    CHECK(contains(found, message));
  };
  refused("[", "is not JSON");
  refused("[1]", "it must be an object, found a list of 1");
  const std::vector<std::pair<std::string, std::pair<Json, std::string>>> cases{
      {"/graph", {"", "graph is empty"}},
      {"/capacity", {true, "'capacity' must be an integer of at least 1, found true"}},
      {"/compute_capability", {1e9, "'compute_capability' must be an integer of at least 1 and at most 999 or null"}},
      {"/options/ampere_plus", {1, "options: 'ampere_plus' must be true or false, found 1"}},
      {"/inputs/0/opt", {{1, -1}, "inputs[0].opt must be a list of at most 8 sizes"}},
      {"/inputs/0/max", {Json::array(), "different numbers of dims"}},
      {"/inputs/1", {sound["inputs"][0], "the name 'input_ids' stands twice"}},
  };
  for (const auto& [pointer, change] : cases) {
    Json changed = sound;
    changed[Json::json_pointer(pointer)] = change.first;
    refused(changed.dump(), change.second);
  }
}
