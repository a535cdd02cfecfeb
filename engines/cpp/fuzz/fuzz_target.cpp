// A libFuzzer target; CRT_FUZZ_PARSER names the parser. Every parser reads files, so each input becomes one.
#include <stdlib.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "parsers.hpp"

namespace {

/// A folder in memory that goes with the process.
class ScratchFolder {
 public:
  ScratchFolder() {
    const char* parent = std::filesystem::is_directory("/dev/shm") ? "/dev/shm" : "/tmp";
    path_ = std::string(parent) + "/crt_fuzz_XXXXXX";
    if (::mkdtemp(path_.data()) == nullptr) std::abort();
  }
  ~ScratchFolder() {
    std::error_code problem;
    std::filesystem::remove_all(path_, problem);
  }
  ScratchFolder(const ScratchFolder&) = delete;
  ScratchFolder& operator=(const ScratchFolder&) = delete;

  std::string file() const { return path_ + "/input"; }

 private:
  std::string path_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const ScratchFolder scratch;
  const std::string path = scratch.file();
  std::FILE* stream = std::fopen(path.c_str(), "wb");
  if (stream == nullptr || std::fwrite(data, 1, size, stream) != size || std::fclose(stream) != 0) std::abort();
  crt_fuzz::parse(CRT_FUZZ_PARSER, path);
  return 0;
}
