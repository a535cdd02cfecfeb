// Snapshot files: what is written comes back, and nothing of a damaged or hostile file is believed.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "crt_runtime/error.hpp"
#include "crt_runtime/snapshot.hpp"

namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

/// A folder of this test, removed with it.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("crt_snapshot_" + std::to_string(::getpid()))) {
    fs::create_directories(path_);
  }
  ~Folder() {
    std::error_code ignored;
    fs::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string file(const std::string& name) const { return (path_ / name).string(); }
  std::size_t count() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(path_), fs::directory_iterator()));
  }

 private:
  fs::path path_;
};

crt::Snapshot small_snapshot() {
  return {std::string(64, 'a'),
          "ort-cpu-fp32",
          {{"position", "I64", {1}, {1, 0, 0, 0, 0, 0, 0, 0}},
           {"seen", "U8", {1, 3}, {0, 1, 0}},
           {"empty", "F16", {1, 0, 2}, {}},
           {"logits", "F32", {1, 1}, {0, 0, 128, 63}}}};
}

std::string content_of(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

void write(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary) << content;
}

std::string with_header(const std::string& header, const std::string& data) {
  std::string bytes;
  for (unsigned shift = 0; shift < 64; shift += 8) {
    bytes.push_back(static_cast<char>(static_cast<std::uint64_t>(header.size()) >> shift & 0xffU));
  }
  return bytes + header + data;
}

std::string refusal(const std::string& path) {
  try {
    crt::Snapshot::load(path);
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::bundle);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("snapshot file: a link stays and its target is new; what is no file is refused and stays") {
  const Folder folder;
  fs::create_directory(folder.file("disk"));
  write(folder.file("disk/real"), "old");
  ::chmod(folder.file("disk/real").c_str(), 0600);
  fs::create_symlink("disk/real", folder.file("link"));
  fs::create_symlink("link", folder.file("again"));
  fs::create_symlink("disk/new", folder.file("dangling"));
  for (const char* link : {"again", "dangling"}) {
    small_snapshot().save(folder.file(link));
    CHECK(fs::is_symlink(folder.file(link)));
    CHECK(crt::Snapshot::load(folder.file(link)).target == "ort-cpu-fp32");
  }
  CHECK(fs::is_symlink(folder.file("link")));
  CHECK(content_of(folder.file("disk/real")) == content_of(folder.file("disk/new")));
  CHECK(fs::status(folder.file("disk/real")).permissions() == fs::perms(0600));  // what was private stays so
  CHECK(std::distance(fs::directory_iterator(folder.file("disk")), fs::directory_iterator()) == 2);

  REQUIRE(::mkfifo(folder.file("pipe").c_str(), 0600) == 0);
  fs::create_symlink("pipe", folder.file("to_pipe"));
  fs::create_symlink("loop", folder.file("loop"));
  const std::size_t before = folder.count();
  const std::pair<std::string, const char*> refused[] = {{folder.file("pipe"), "it is a pipe"},
                                                         {folder.file("to_pipe"), "it is a pipe"},
                                                         {folder.file("disk"), "it is a folder"},
                                                         {"/dev/null", "it is a device"},
                                                         {folder.file("loop"), "Too many"}};
  for (const auto& [path, words] : refused) {
    CAPTURE(path);
    CHECK_THROWS_WITH_AS(small_snapshot().save(path), doctest::Contains(words), crt::Error);
  }
  CHECK(folder.count() == before);
  CHECK(fs::is_fifo(folder.file("pipe")));
  CHECK(fs::is_character_file("/dev/null"));
  CHECK(refusal(folder.file("pipe")) != "");  // and reading it does not wait for a writer
  small_snapshot().save(folder.file(std::string(255, 'n')));  // as long as a name can be
  CHECK(folder.count() == before + 1);
}

TEST_CASE("snapshot file: what is saved comes back, sorted by name, and nothing else is left in the folder") {
  const Folder folder;
  const crt::Snapshot saved = small_snapshot();
  saved.save(folder.file("one.snapshot"));
  saved.save(folder.file("one.snapshot"));  // in place of the first
  CHECK(folder.count() == 1);
  const crt::Snapshot loaded = crt::Snapshot::load(folder.file("one.snapshot"));
  CHECK(loaded.bundle == saved.bundle);
  CHECK(loaded.target == saved.target);
  REQUIRE(loaded.tensors.size() == 4);
  CHECK(loaded.tensors[0].name == "empty");
  CHECK(loaded.tensors[0].shape == std::vector<std::int64_t>{1, 0, 2});
  CHECK(loaded.tensors[1].data == saved.tensors[3].data);
  CHECK(loaded.tensors[2].dtype == "I64");
  CHECK(loaded.tensors[3].data == saved.tensors[1].data);
  const std::string text = content_of(folder.file("one.snapshot"));
  CHECK((8 + static_cast<unsigned char>(text[0]) + 256U * static_cast<unsigned char>(text[1])) % 8 == 0);
}

TEST_CASE("snapshot file: where it cannot be written, nothing changes") {
  const Folder folder;
  std::string text;
  try {
    small_snapshot().save(folder.file("missing/one.snapshot"));
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::input);
    text = error.what();
  }
  CHECK(text.find("cannot write the snapshot") == 0);
  fs::create_directory(folder.file("taken"));
  CHECK_THROWS_AS(small_snapshot().save(folder.file("taken")), crt::Error);
  CHECK(folder.count() == 1);
}

TEST_CASE("snapshot file: every truncation and every changed byte is refused") {
  const Folder folder;
  const std::string path = folder.file("good");
  small_snapshot().save(path);
  const std::string good = content_of(path);
  for (std::size_t length = 0; length < good.size(); ++length) {
    write(path, good.substr(0, length));
    CHECK_MESSAGE(!refusal(path).empty(), "cut to " << length);
  }
  write(path, good + "x");
  CHECK(refusal(path).find("its tensors take 15 bytes, the file holds 16") != std::string::npos);
  for (std::size_t at = good.size() - 15; at < good.size(); ++at) {
    std::string changed = good;
    changed[at] = static_cast<char>(changed[at] ^ 1);
    write(path, changed);
    CHECK(refusal(path).find("is damaged: its tensors have SHA-256") != std::string::npos);
  }
}

TEST_CASE("snapshot file: names and metadata of any text come back, escaped as Python escapes them") {
  const Folder folder;
  const std::string path = folder.file("escaped");
  const std::string text = "a\"\\/\b\f\n\r\t\x01\x1f\x7f\xC3\xA9\xF0\x9F\x98\x80";
  crt::Snapshot snapshot = small_snapshot();
  snapshot.target = text;
  snapshot.tensors[1].name = text;
  snapshot.save(path);
  const std::string header = content_of(path).substr(8);
  CHECK(header.find(R"("a\"\\/\b\f\n\r\t\u0001\u001f)" "\x7f\xC3\xA9\xF0\x9F\x98\x80\"") != std::string::npos);
  const crt::Snapshot loaded = crt::Snapshot::load(path);
  CHECK(loaded.target == text);
  CHECK(loaded.tensors[0].name == text);
  snapshot.target = "\xFFx";  // no UTF-8
  snapshot.save(path);
  CHECK(crt::Snapshot::load(path).target == "\xEF\xBF\xBDx");
}

TEST_CASE("snapshot file: hostile headers are refused with what is wrong") {
  const Folder folder;
  const std::string path = folder.file("hostile");
  small_snapshot().save(path);
  const std::string good = content_of(path);
  const std::size_t header_bytes = static_cast<unsigned char>(good[0]) + 256U * static_cast<unsigned char>(good[1]);
  const Json header = Json::parse(good.substr(8, header_bytes));
  const std::string data = good.substr(8 + header_bytes);
  const std::vector<std::pair<std::function<void(Json&)>, std::string>> changes{
      {[](Json& h) { h.erase("__metadata__"); }, "its format is None"},
      {[](Json& h) { h["__metadata__"] = 3; }, "its format is None"},
      {[](Json& h) { h["__metadata__"]["format"] = "other"; }, "its format is 'other'"},
      {[](Json& h) { h["__metadata__"]["format_version"] = "2"; }, "has format version 2; this version reads up to 1"},
      {[](Json& h) { h["__metadata__"]["format_version"] = "-1"; }, "its format version is '-1'"},
      {[](Json& h) { h["__metadata__"].erase("bundle"); }, "its metadata lack bundle"},
      {[](Json& h) { h["seen"]["dtype"] = "I8"; }, "expected I64, F32, F16 or U8"},
      {[](Json& h) { h["seen"]["shape"] = {1, 4}; }, "tell different sizes"},
      {[](Json& h) { h["seen"]["shape"] = std::vector<int>(65, 1); }, "has 65 dims; a tensor has at most 64"},
      {[](Json& h) { h["seen"]["shape"] = {1, -3}; }, "shape must be a list of whole numbers"},
      {[](Json& h) { h["seen"]["shape"] = {4611686018427387904, 4, 3}; }, "tell different sizes"},
      {[](Json& h) { h["seen"]["data_offsets"] = {0, 3}; }, "begins at byte"},
      {[](Json& h) { h["seen"]["data_offsets"] = {12, 9223372036854775807}; }, "tell different sizes"},
      {[](Json& h) { h["seen"]["data_offsets"] = {15, 12}; }, "data_offsets must be begin and end"},
      {[](Json& h) { h["seen"]["data_offsets"] = {12}; }, "data_offsets must be begin and end"},
      {[](Json& h) { h.erase("seen"); }, "its tensors take 12 bytes, the file holds 15"},
      {[](Json& h) { h["seen"] = 1; }, "shape must be a list"},
  };
  for (const auto& [change, part] : changes) {
    Json changed = header;
    change(changed);
    write(path, with_header(changed.dump(), data));
    CHECK_MESSAGE(refusal(path).find(part) != std::string::npos, refusal(path), " / wanted: ", part);
  }
  write(path, with_header("[]", ""));
  CHECK(refusal(path).find("its header must be a JSON object") != std::string::npos);
  write(path, with_header("{\"a\": \xff}", ""));
  CHECK(refusal(path).find("is not UTF-8") != std::string::npos);
  write(path, std::string("\xff\xff\xff\xff\xff\xff\xff\x7f", 8) + "{}");
  CHECK(refusal(path).find("its header claims 9223372036854775807 bytes") != std::string::npos);
  CHECK(refusal(folder.file("nothing")).find("expected a snapshot file, found nothing") == 0);
  CHECK(refusal(folder.file(".")).find("expected a snapshot file") == 0);
}

TEST_CASE("snapshot file: a path with a NUL byte names no file, and is not cut at it") {
  const Folder folder;
  const std::string path = folder.file(std::string("a\0b", 3));
  const auto refused = [](crt::ErrorKind kind, const std::function<void()>& call) -> std::string {
    try {
      call();
    } catch (const crt::Error& error) {
      CHECK(error.kind() == kind);
      return error.what();
    }
    return "";
  };
  const std::string shown = "'" + folder.file("a") + "\\x00b'";
  CHECK(refused(crt::ErrorKind::input, [&] { small_snapshot().save(path); }) ==
        "cannot write the snapshot " + shown + ": a path must not hold a NUL byte");
  CHECK(folder.count() == 0);
  small_snapshot().save(folder.file("a"));
  CHECK(refused(crt::ErrorKind::bundle, [&] { crt::Snapshot::load(path); }) ==
        "expected a snapshot file, found a path with a NUL byte: " + shown);
}
