// Every rule of manifest.json is enforced when a bundle is opened.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "bundle/integrity.hpp"
#include "bundle/json.hpp"
#include "bundle/sha256.hpp"
#include "bundle_folder.hpp"

namespace {

namespace fs = std::filesystem;
using crt_test::BundleFolder;
using crt_test::Json;

std::string refusal_of(const BundleFolder& bundle, bool allow_unvalidated = false) {
  return crt_test::refusal([&] { crt::BundleFiles::open(bundle.text(), allow_unvalidated); });
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

Json file_entry() { return {{"size", 0}, {"sha256", std::string(64, '0')}}; }

}  // namespace

TEST_CASE("manifest: a sound bundle opens, and its identity is the manifest's SHA-256") {
  const BundleFolder bundle;
  const crt::BundleFiles files = crt::BundleFiles::open(bundle.text() + "/", false);
  CHECK(files.path() == bundle.text());
  const std::string text = bundle.manifest_text();
  CHECK(files.identity() == crt::sha256_hex(text.data(), text.size()));
  CHECK(files.target_names() == std::vector<std::string>{"ort", "rtx"});
  CHECK(crt::sha256_hex("abc", 3) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST_CASE("manifest: bytes that are no manifest") {
  const BundleFolder bundle;
  const std::vector<std::pair<std::string, std::string>> cases{
      {"\xff\xfe{}", "not UTF-8 (byte 0)"},
      {"{", "not JSON"},
      {"", "not JSON"},
      {"[]", "must hold a JSON object, found a list of 0"},
      {R"({"schema_version": 1, "schema_version": 1})", "stands twice"},
      {R"({"schema_version": NaN})", "not JSON"},
      {std::string(200000, '['), "nested too deeply"},
      {"{\"schema_version\": " + std::string(10000, '9') + "}", "not JSON"},
      {"{}", "expected an integer 'schema_version' of 1 or more, found nothing"},
      {R"({"schema_version": true})", "expected an integer 'schema_version' of 1 or more, found true"},
      {R"({"schema_version": "1"})", "expected an integer 'schema_version' of 1 or more, found '1'"},
      {R"({"schema_version": 0})", "expected an integer 'schema_version'"},
      {R"({"schema_version": 1.0})", "expected an integer 'schema_version' of 1 or more, found 1"},
      {R"({"schema_version": 2, "files": 3})", "reads up to version 1: upgrade crt-export"},
  };
  for (const auto& [content, message] : cases) {
    bundle.write_manifest(content);
    const std::string found = refusal_of(bundle);
    INFO(found);
    CHECK(contains(found, message));
    CHECK(contains(found, bundle.text() + "/manifest.json"));
  }
}

TEST_CASE("manifest: every truncation is refused") {
  const BundleFolder bundle;
  const std::string text = bundle.manifest.dump();
  for (std::size_t length = 0; length < text.size(); length += 61) {
    bundle.write_manifest(text.substr(0, length));
    CHECK(contains(refusal_of(bundle), "not JSON"));
  }
}

TEST_CASE("manifest: a link, a pipe, a folder, a huge file, or none") {
  const BundleFolder bundle;
  const fs::path path = bundle.path() / "manifest.json", elsewhere = bundle.path() / "elsewhere";
  fs::rename(path, elsewhere);
  CHECK(contains(refusal_of(bundle), "is not a bundle: it has no manifest.json; build one with 'crt-export build'"));
  fs::create_symlink(elsewhere, path);
  CHECK(contains(refusal_of(bundle), "cannot read " + path.string()));
  fs::remove(path);
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  CHECK(contains(refusal_of(bundle), "cannot read " + path.string() + ": is not a regular file"));
  fs::remove(path);
  fs::create_directory(path);
  CHECK(contains(refusal_of(bundle), "cannot read " + path.string()));
  fs::remove(path);
  bundle.write_manifest("");
  fs::resize_file(path, std::uintmax_t{1} << 40U);  // a hole, no room taken
  CHECK(contains(refusal_of(bundle), "a manifest has at most 67108864"));
}

TEST_CASE("manifest: each key is required and typed") {
  const BundleFolder sound;
  BundleFolder bundle;
  for (const auto& [key, value] : sound.manifest.items()) {
    if (key == "schema_version") continue;
    bundle.manifest = sound.manifest;
    bundle.manifest.erase(key);
    bundle.write_manifest();
    CHECK(contains(refusal_of(bundle), "lacks '" + key + "'"));
    bundle.manifest = sound.manifest;
    bundle.manifest[key] = 7;
    bundle.write_manifest();
    CHECK(contains(refusal_of(bundle), "'" + key + "' must be"));
  }
}

TEST_CASE("manifest: each rule of the schema") {
  const BundleFolder sound;
  const Json file = file_entry();
  const std::vector<std::pair<std::string, std::pair<Json, std::string>>> cases{
      {"/tool/name", {"other", "tool: 'name' must be one of crt-export, found 'other'"}},
      {"/tool/version", {1, "tool: 'version' must be a text, found 1"}},
      {"/checkpoint", {Json::object(), "checkpoint lacks 'sha256'"}},
      {"/parity", {nullptr, "no parity report that passed"}},
      {"/parity/passed", {1, "no parity report that passed"}},
      {"/parity", {Json::object(), "no parity report that passed"}},
      {"/graphs/0", {Json::array(), "graphs[0] must be an object, found a list of 0"}},
      {"/graphs/0/weights", {"absent", "graphs[0]['weights'] is 'absent', which is not listed in 'files'"}},
      {"/graphs/0/quantized_matmuls", {true, "'quantized_matmuls' must be an integer, found true"}},
      {"/graphs/0/unroll", {1.5, "'unroll' must be an integer or null, found 1.5"}},
      {"/graphs/0/roles", {Json::array(), "'roles' must be some of session, compiler, interchange, validation"}},
      {"/graphs/0/roles", {Json::array({"spare"}), "'roles' must be some of session, compiler, interchange, validation"}},
      {"/targets/t", {Json::object(), "targets['t'] lacks 'profile'"}},
      {"/targets/ort/engines/step", {"x", "engines['step'] is 'x', which is not listed"}},
      {"/targets/ort/graphs/step", {3, "graphs['step'] is 3, which is not listed"}},
      {"/targets/ort/capacity", {0, "'capacity' must be an integer of at least 1, found 0"}},
      {"/targets/ort/unroll", {-8, "'unroll' must be an integer of at least 1 or null, found -8"}},
      {"/targets/ort/cache_dtype", {"int8", "'cache_dtype' must be one of float32 float16, found 'int8'"}},
      {"/contract/step", {1, "contract['step'] must be an object"}},
      {"/contract/step/inputs/0", {1, "contract['step'].inputs[0] must be an object"}},
      {"/contract/step/aliases/0", {Json::array({"a"}), "contract['step'].aliases must be pairs of names"}},
      {"/contract/step/continues/0", {Json::array({"a", 1}), "contract['step'].continues must be pairs of names"}},
      {"/files/report.md/size", {-1, "'size' must be an integer of at least 0, found -1"}},
      {"/files/report.md/size", {1.5, "'size' must be an integer of at least 0, found 1.5"}},
      {"/files/report.md/size", {true, "'size' must be an integer of at least 0, found true"}},
      {"/files/report.md/size", {18446744073709551615ULL, "a whole number is beyond 64 bits"}},
      {"/files/report.md/sha256", {std::string(64, 'A'), "64 lower-case hex digits"}},
      {"/files/report.md", {nullptr, "files['report.md'] must be an object, found null"}},
      {"/files/~1etc~1passwd", {file, "absolute path"}},
      {"/files/..~1secret", {file, "component '..', which could lead out"}},
      {"/files/graphs~1..~1..~1secret", {file, "component '..'"}},
      {"/files/graphs~1~1x", {file, "component ''"}},
      {"/files/.~1x", {file, "component '.'"}},
      {"/files/", {file, "must have 1 to 1024 characters, has 0"}},
      {"/files/graphs\\x", {file, "contains '\\'; use '/' between folders"}},
      {"/files/C:x", {file, "no drive letter"}},
      {"/files/a\n", {file, "contains '\\n'"}},
      {"/files/" + std::string(1025, 'x'), {file, "must have 1 to 1024 characters, has 1025"}},
      {"/files/x. ", {file, "ends in a dot or a space"}},
      {"/files/x.~1y", {file, "ends in a dot or a space"}},
      {"/files/manifest.json", {file, "cannot list itself"}},
  };
  BundleFolder bundle;
  for (const auto& [pointer, change] : cases) {
    bundle.manifest = sound.manifest;
    bundle.manifest[Json::json_pointer(pointer)] = change.first;
    bundle.write_manifest();
    const std::string found = refusal_of(bundle);
    INFO(pointer << ": " << found);
    CHECK(contains(found, change.second));
  }
}

TEST_CASE("manifest: names that do not mean the same everywhere are refused") {
  const std::string device = "which is a device on Windows", ascii = "only those of ASCII";
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases{
      {{"graphs/NUL"}, device},
      {{"con.txt"}, device},
      {{"a/Com1.tar.gz"}, device},
      {{"lpt9 .x"}, device},
      {{"CONIN$"}, device},
      {{"aux/file"}, device},
      {{"COM\xC2\xB9"}, "contains '\xC2\xB9'; "},
      {{"graphs/\xC3\xA9"}, ascii},
      {{"graphs/e\xCC\x81"}, ascii},
      {{"graphs/\xC2\x9B" "31m"}, "contains '\\x9b'"},
      {{"graphs/A.bin", "graphs/a.bin"}, "'graphs/A.bin' and 'graphs/a.bin' differ in upper and lower case only"},
      {{"Other/x", "other/y"}, "'Other' and 'other' differ in upper and lower case only"},
      {{std::string(256, 'x')}, "contains a component of 256 characters"},
      {{"a<b"}, "contains '<'"},
  };
  const BundleFolder sound;
  BundleFolder bundle;
  for (const auto& [names, message] : cases) {
    bundle.manifest = sound.manifest;
    for (const std::string& name : names) bundle.manifest["files"][name] = file_entry();
    bundle.write_manifest();
    const std::string found = refusal_of(bundle);
    INFO(found);
    CHECK(contains(found, message));
  }
  for (const char* name : {"console/com.txt", "com10", "nul-1", "a b", "lpt", "~x!$&'()+,;=@[]^`{}"}) {
    CHECK_FALSE(crt::name_problem(name));
  }
}

TEST_CASE("manifest: a NUL in a name is refused") {
  BundleFolder bundle;
  bundle.manifest["files"][std::string("a\0b", 3)] = file_entry();
  bundle.write_manifest();
  CHECK(contains(refusal_of(bundle), "contains '\\x00'"));
}

TEST_CASE("manifest: all problems are listed at once, unknown keys are allowed") {
  BundleFolder bundle;
  bundle.manifest["note"] = "added by a later 0.x";
  bundle.write_manifest();
  CHECK(refusal_of(bundle).empty());
  bundle.manifest["tool"]["name"] = "other";
  bundle.manifest["parity"]["passed"] = false;
  bundle.manifest["files"]["report.md"]["size"] = -1;
  bundle.write_manifest();
  const std::string found = refusal_of(bundle);
  CHECK(contains(found, "breaks schema version 1: 3 problems\n  - tool: 'name'"));
}

TEST_CASE("manifest: an unvalidated bundle needs consent") {
  BundleFolder bundle;
  bundle.manifest["validated"] = false;
  bundle.manifest["parity"] = nullptr;
  bundle.write_manifest();
  CHECK(contains(refusal_of(bundle), "is not validated: its agreement with PyTorch was never shown"));
  CHECK(refusal_of(bundle, true).empty());
}

TEST_CASE("manifest: paths that are no bundle") {
  const BundleFolder bundle;
  const fs::path parent = bundle.path().parent_path();
  const auto refused = [](const fs::path& path, const std::string& message) {
    const std::string found = crt_test::refusal([&] { crt::BundleFiles::open(path.string(), false); });
    INFO(found);
    return contains(found, message);
  };
  CHECK(refused(parent / "absent", "no such bundle folder: " + (parent / "absent").string()));
  CHECK(refused(bundle.path() / "report.md", "expected a bundle folder, found a file"));
  CHECK(refused(std::string("x\0y", 3), "holds no NUL"));
  fs::create_directory(parent / "empty");
  CHECK(refused(parent / "empty", "is not a bundle: it has no manifest.json"));
  fs::create_directory(parent / ".absent.partial-4194304");
  CHECK(refused(parent / "absent", "an unfinished build is beside it (.absent.partial-4194304)"));
  fs::create_directory_symlink(bundle.path(), parent / "latest");
  CHECK(crt::BundleFiles::open((parent / "latest").string(), false).path() == bundle.text());
}

TEST_CASE("manifest: a bundle that is just being replaced is waited for") {
  const BundleFolder bundle;
  const fs::path parent = bundle.path().parent_path(), previous = parent / ".demo.previous-1";
  const int parent_folder = ::open(parent.c_str(), O_RDONLY | O_DIRECTORY);
  REQUIRE(flock(parent_folder, LOCK_EX) == 0);  // as a build does around its two renames
  fs::rename(bundle.path(), previous);
  std::thread build([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    fs::rename(previous, bundle.path());
    ::close(parent_folder);
  });
  const std::string found = refusal_of(bundle);
  build.join();
  CHECK(found.empty());
}

TEST_CASE("manifest: leftovers are refused even if complete, and never moved") {
  const BundleFolder bundle;
  const fs::path parent = bundle.path().parent_path();
  for (const char* name : {".demo.partial-17", ".demo.previous-4194304"}) {
    const fs::path abandoned = parent / name;
    fs::rename(bundle.path(), abandoned);
    const std::string found = crt_test::refusal([&] { crt::BundleFiles::open(abandoned.string(), false); });
    CHECK(contains(found, "what an interrupted or running build left behind, not a bundle: open " + bundle.text()));
    const std::string absent = refusal_of(bundle);
    INFO(absent);
    const bool previous = std::string(name).find("previous") != std::string::npos;
    CHECK(contains(absent, previous ? "was interrupted and the old bundle is set aside" : "no such bundle folder"));
    CHECK(fs::exists(abandoned));
    fs::rename(abandoned, bundle.path());
  }
  for (const char* name :
       {"demo.partial-1", ".demo.partial-", ".demo.partial-12345678901", "..partial-1", ".demo.other-1"}) {
    const fs::path plain = parent / name;
    fs::rename(bundle.path(), plain);
    CHECK(crt_test::refusal([&] { crt::BundleFiles::open(plain.string(), false); }).empty());
    fs::rename(plain, bundle.path());
  }
}

TEST_CASE("manifest: no bit of it can flip unnoticed") {
  const BundleFolder bundle;
  const std::string text = bundle.manifest_text();
  const std::string values = crt::canonical(crt::parse_json(text));
  std::size_t refused = 0, accepted = 0;
  for (std::size_t bit = 0; bit < 8 * text.size(); bit += 7) {  // every byte, in turn another bit of it
    std::string flipped = text;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    bundle.write_manifest(flipped);
    if (!refusal_of(bundle).empty()) {
      ++refused;
      continue;
    }
    ++accepted;
    CHECK(crt::canonical(crt::parse_json(flipped)) == values);
  }
  CHECK(refused > 100 * (accepted + 1));
}

TEST_CASE("manifest: the canonical bytes of a value") {
  const std::string text = R"({"b": [null, true, false, -12, 0.5, -0.0, 1e3], "a\u00e9": "\u00e9/", "a": {}})";
  CHECK(crt::canonical(crt::parse_json(text)) ==
        "o1:aoe3:a\xc3\xa9" "3:\xc3\xa9/" "1:blntfi-12ed3fe0000000000000d8000000000000000d408f400000000000ee");
}
