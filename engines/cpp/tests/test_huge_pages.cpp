// Memory that appears while a graph is loaded is moved into huge pages, and nothing else is touched.
#include <doctest/doctest.h>

#include <sstream>
#include <vector>

#include "engine/memory_map.hpp"

namespace {

using crt::MemoryRange;
using Ranges = std::vector<MemoryRange>;

TEST_CASE("huge pages: only private, writable memory without a file counts") {
  std::istringstream maps(
      "555500000000-555500021000 rw-p 00000000 00:00 0                          [heap]\n"
      "7f0000000000-7f0000400000 rw-p 00000000 00:00 0 \n"
      "7f0000400000-7f0000800000 r--p 00000000 00:00 0 \n"
      "7f0000800000-7f0000c00000 rw-s 00000000 00:01 7                          /memfd:shared (deleted)\n"
      "7f0000c00000-7f0001000000 rw-p 00001000 fe:00 1234                       /opt/a folder/weights.data\n"
      "7f0001000000-7f0001400000 rw-p 00000000 00:00 0                          [anon:arena]\n");
  CHECK(crt::private_memory(maps) == Ranges{{0x555500000000, 0x555500021000},
                                            {0x7f0000000000, 0x7f0000400000},
                                            {0x7f0001000000, 0x7f0001400000}});
}

TEST_CASE("huge pages: what was there before is left out, also where new memory has joined it") {
  CHECK(crt::without({{10, 20}, {30, 40}}, {}) == Ranges{{10, 20}, {30, 40}});
  CHECK(crt::without({{10, 20}}, {{10, 20}}).empty());
  CHECK(crt::without({{10, 50}}, {{0, 12}, {20, 30}, {48, 60}}) == Ranges{{12, 20}, {30, 48}});
  CHECK(crt::without({{10, 20}, {30, 40}}, {{15, 35}}) == Ranges{{10, 15}, {35, 40}});
}

TEST_CASE("huge pages: contents stay, wanted or not") {
  for (const bool wanted : {true, false}) {
    std::vector<int> values;
    crt::allocated_in_huge_pages(wanted, [&] {
      values.resize(std::size_t{4} << 20U);
      for (std::size_t index = 0; index < values.size(); ++index) values[index] = static_cast<int>(index);
    });
    bool same = true;
    for (std::size_t index = 0; index < values.size(); ++index) same = same && values[index] == static_cast<int>(index);
    CHECK(same);
  }
}

}  // namespace
