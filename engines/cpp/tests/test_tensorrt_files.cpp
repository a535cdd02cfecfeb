// What a TensorRT target keeps in files: sidecars and the cache of compiled kernels; and what TensorRT logs.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <locale>
#include <string>
#include <vector>

#include "tensorrt/tensorrt_cache.hpp"
#include "tensorrt/tensorrt_log.hpp"
#include "tensorrt/tensorrt_sidecar.hpp"
#include "tiny_session.hpp"

namespace {

using crt_test::refused;

crt::Target target() {
  crt::Target target;
  target.name = "trt-sm80-fp16";
  target.runtime = "tensorrt";
  target.compute_capability = 80;
  target.capacity = 512;
  return target;
}

crt::EngineSidecar sidecar() {
  crt::EngineSidecar sidecar;
  sidecar.graph = "step";
  sidecar.runtime = "tensorrt";
  sidecar.runtime_version = "10.16.1.11";
  sidecar.compute_capability = 80;
  sidecar.capacity = 512;
  return sidecar;
}

const crt::EngineHost kA100{"10.16.1.11", "NVIDIA A100", 80};
const crt::EngineHost kH200{"10.16.1.11", "NVIDIA H200", 90};

std::string refusal(const crt::EngineSidecar& sidecar, const crt::EngineHost& host,
                    crt::ErrorKind kind = crt::ErrorKind::missing_dependency) {
  return refused([&] { crt::check_sidecar("engines/step.engine", sidecar, target(), "step", host); }, kind);
}

bool has(const std::string& text, const std::string& part) {
  INFO(text);
  return text.find(part) != std::string::npos;
}

/// XDG_CACHE_HOME in a folder of this test.
class CacheFolder {
 public:
  CacheFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "crt-cache-XXXXXX").string();
    REQUIRE(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
    const char* given = std::getenv("XDG_CACHE_HOME");
    before_ = given == nullptr ? "" : given;
    ::setenv("XDG_CACHE_HOME", path_.c_str(), 1);
  }
  ~CacheFolder() {
    before_.empty() ? ::unsetenv("XDG_CACHE_HOME") : ::setenv("XDG_CACHE_HOME", before_.c_str(), 1);
    std::filesystem::remove_all(path_);
  }
  CacheFolder(const CacheFolder&) = delete;
  CacheFolder& operator=(const CacheFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  std::string before_;
};

std::string content_of(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

}  // namespace

TEST_CASE("sidecar: the engine of this target, version and GPU passes") { CHECK(refusal(sidecar(), kA100).empty()); }

TEST_CASE("sidecar: another version or GPU is refused with the way out, both at once") {
  crt::EngineSidecar other = sidecar();
  other.runtime_version = "11.4.0.106";
  const std::string text = refusal(other, kH200);
  CHECK(has(text, "engines/step.engine cannot run on this machine: 2 problems"));
  CHECK(has(text, "it was built with TensorRT 11.4.0.106, 10.16.1.11 is installed: install 11.4.0.106"));
  CHECK(has(text, "compiled for compute capability 8.0, the GPU is NVIDIA H200, 9.0: build for a profile with "
                  "compute_capability = 90"));
}

TEST_CASE("sidecar: ampere_plus runs on newer GPUs only, version_compatible with later versions of the same major") {
  crt::EngineSidecar portable = sidecar();
  portable.ampere_plus = true;
  CHECK(refusal(portable, kH200).empty());
  CHECK(has(refusal(portable, {"10.16.1.11", "NVIDIA T4", 75}), "compute capability 8.0 or newer"));

  crt::EngineSidecar lasting = sidecar();
  CHECK_FALSE(refusal(lasting, {"10.17.0.3", "NVIDIA A100", 80}).empty());
  lasting.version_compatible = true;
  CHECK(refusal(lasting, {"10.17.0.3", "NVIDIA A100", 80}).empty());
  CHECK_FALSE(refusal(lasting, {"10.15.9.9", "NVIDIA A100", 80}).empty());
  CHECK_FALSE(refusal(lasting, {"11.0.0.114", "NVIDIA A100", 80}).empty());
}

TEST_CASE("sidecar: versions are read alike in every locale of the application") {
  class Dots : public std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  crt::EngineSidecar lasting = sidecar();
  lasting.version_compatible = true;
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Dots));
  const std::string text = refusal(lasting, {"10.17.0.3", "NVIDIA A100", 80});
  std::locale::global(before);
  CHECK(text == "");
}

TEST_CASE("sidecar: one of another graph, runtime, GPU or capacity than the manifest says is a damaged bundle") {
  crt::EngineSidecar swapped = sidecar();
  swapped.graph = "prefill";
  swapped.runtime = "tensorrt-rtx";
  swapped.compute_capability = 89;
  swapped.capacity = 256;
  const std::string text = refusal(swapped, kA100, crt::ErrorKind::bundle);
  CHECK(has(text, "4 problems"));
  CHECK(has(text, "graph step expected, prefill found"));
  CHECK(has(text, "runtime tensorrt expected, tensorrt-rtx found"));
  CHECK(has(text, "compute_capability 80 expected, 89 found"));
  CHECK(has(text, "capacity 512 expected, 256 found"));
}

TEST_CASE("sidecar: the loaded engine must have the sidecar's shapes, capacity and in-place updates") {
  crt_test::TinySession session(1);
  crt::EngineSidecar facts = sidecar();
  facts.capacity = 7;
  for (const crt::EngineTensor& tensor : session.engine->tensors()) {
    if (tensor.is_input) {
      facts.input_shapes[tensor.spec.name] = {tensor.least, tensor.least, tensor.most};
    }
  }
  crt::GraphContract contract;
  contract.aliases = {{"present_key_values.0.key", "past_key_values.0.key"}};
  CHECK(crt::engine_problems(session.engine->tensors(), facts, contract).empty());

  facts.capacity = 8;
  facts.input_shapes["state"][2][0] = 9;
  std::vector<crt::EngineTensor> tensors = session.engine->tensors();
  CHECK(crt::engine_problems(tensors, facts, contract) ==
        std::vector<std::string>{"state must take shapes [1, 1, 5] to [9, 1, 5], found [1, 1, 5] to [4, 1, 5]",
                                 "present_key_values.0.key must hold 8 tokens, found [-1, 1, 7, 1]"});
  tensors.back().alias.clear();
  facts.capacity = 7;
  facts.input_shapes["state"][2][0] = 4;
  CHECK(crt::engine_problems(tensors, facts, contract) ==
        std::vector<std::string>{
            "present_key_values.0.key must share memory with past_key_values.0.key, found nothing"});
}

TEST_CASE("kernel cache: what is stored is loaded by the next process, and only its owner can read it") {
  const CacheFolder folder;
  const std::string path = crt::runtime_cache_path("1.7.1.116/abc").value_or("");
  CHECK(path == (folder.path() / "crt-export/tensorrt-rtx/1.7.1.116/abc.cache").string());
  crt::RuntimeCacheFile file("1.7.1.116/abc");
  CHECK(file.load().empty());
  const std::string kernels("ker\0nels", 8);
  file.store(kernels.data(), kernels.size());
  CHECK(crt::RuntimeCacheFile("1.7.1.116/abc").load() == kernels);
  struct stat state{};
  REQUIRE(::stat(path.c_str(), &state) == 0);
  CHECK((state.st_mode & 0777) == 0600);
  // The format of crt_export/engine/tensorrt/engine.py: a line, the SHA-256 of the rest, the rest.
  const std::string content = content_of(path);
  CHECK(content.substr(0, 32) == "crt-export tensorrt-rtx cache 1\n");
  CHECK(content.size() == 32 + 32 + kernels.size());
  CHECK(std::distance(std::filesystem::directory_iterator(folder.path() / "crt-export/tensorrt-rtx/1.7.1.116"),
                      std::filesystem::directory_iterator()) == 1);  // no draft is left
}

TEST_CASE("kernel cache: a damaged or shortened file is as good as none") {
  const CacheFolder folder;
  crt::RuntimeCacheFile("name").store("kernels", 7);
  const std::string path = crt::runtime_cache_path("name").value_or("");
  std::string content = content_of(path);
  content.back() = 'S';
  std::ofstream(path, std::ios::binary) << content;
  CHECK(crt::RuntimeCacheFile("name").load().empty());
  std::ofstream(path, std::ios::binary) << content.substr(0, 40);
  CHECK(crt::RuntimeCacheFile("name").load().empty());
}

TEST_CASE("kernel cache: one that cannot be written or has no place is lost without a word") {
  const CacheFolder folder;
  std::ofstream(folder.path() / "crt-export") << "a file where the folder should be";
  crt::RuntimeCacheFile file("name");
  file.store("kernels", 7);
  CHECK(file.load().empty());
}

TEST_CASE("runtime log: keeps the first texts in bounded memory and forgets them once they are taken") {
  crt::RuntimeLog log;
  CHECK(log.take().empty());
  log.keep("first");
  log.keep(nullptr);
  log.keep("second");
  CHECK(log.take() == "first; second");
  CHECK(log.take().empty());
  log.keep(std::string(5000, 'x').c_str());
  log.keep("too late");
  CHECK(log.take() == std::string(2048, 'x'));
}
