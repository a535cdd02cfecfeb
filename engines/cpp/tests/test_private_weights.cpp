// What is mapped from a file becomes a copy at the same addresses; nothing else is touched.
#include <doctest/doctest.h>

#include <sstream>

#include "engine/memory_map.hpp"

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#endif

TEST_CASE("private weights: mappings of one file are told from those of others") {
  std::istringstream maps(
      "7f0000000000-7f0000400000 rw-p 00000000 00:00 0\n"
      "7f0000400000-7f0000800000 rw-p 00002000 fe:00 7                          /opt/a folder/weights\n"
      "7f0000800000-7f0000801000 r--s 00000000 fe:00 7                          /opt/a folder/weights\n"
      "7f0000801000-7f0000802000 r--p 00000000 fe:01 7                          /opt/other\n");
  const auto found = crt::mappings_beside(maps, 0x7f0000800010);
  REQUIRE(found);
  REQUIRE(found->size() == 1);
  CHECK(found->front().range == crt::MemoryRange{0x7f0000400000, 0x7f0000800000});
  CHECK(found->front().offset == 0x2000);
  std::istringstream none("7f0000000000-7f0000400000 rw-p 00000000 00:00 0\n");
  CHECK_FALSE(crt::mappings_beside(none, 0x7f0000000000));
}

#ifdef __linux__
TEST_CASE("private weights: a copy keeps its content when the file is overwritten and truncated") {
  std::string name = "/tmp/crt_weights_XXXXXX";
  const int file = mkstemp(name.data());
  REQUIRE(file >= 0);
  const std::string content(20000, 'w');
  REQUIRE(write(file, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
  const auto map = [file] { return static_cast<char*>(mmap(nullptr, 20000, PROT_READ, MAP_PRIVATE, file, 0)); };
  char* const kept = map();
  const auto before = crt::mappings_of(file);
  REQUIRE(before);
  CHECK(before->size() == 1);
  char* const made_private = map();
  REQUIRE(crt::make_private(file, *before));
  CHECK(crt::mappings_of(file)->size() == 1);
  REQUIRE(pwrite(file, "xxxx", 4, 0) == 4);
  CHECK(std::string(made_private, content.size()) == content);
  CHECK(std::string(kept, 4) == "xxxx");
  REQUIRE(ftruncate(file, 0) == 0);
  CHECK(std::string(made_private, content.size()) == content);
  munmap(kept, 20000);
  munmap(made_private, 20000);
  close(file);
  unlink(name.c_str());
}
#endif
