// Buffers in device memory.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "tiny_session.hpp"

namespace {

using crt_test::put;
using crt_test::refused;
using crt_test::TinySession;
using crt_test::values_of;

}  // namespace

TEST_CASE("device buffer: starts at zero, reads what was written, through pinned memory and no second allocation") {
  TinySession session(1);
  const auto buffer = session.allocate({2, 3}, crt::DType::float32);
  CHECK(values_of<float>(*buffer) == std::vector<float>(6, 0.0F));
  const int pinned = session.device->count("allocate_host");
  put<float>(*buffer, {1, 2, 3, 4, 5, 6});
  CHECK(values_of<float>(*buffer) == std::vector<float>{1, 2, 3, 4, 5, 6});
  buffer->write(buffer->read());
  CHECK(values_of<float>(*buffer) == std::vector<float>{1, 2, 3, 4, 5, 6});
  CHECK(session.device->count("allocate_host") == pinned);
  CHECK(session.device->count("create_stream") == 1);  // all buffers share the streams for copies
}

TEST_CASE("device buffer: rows are copied, entries of a cache cleared, and nothing beside them") {
  TinySession session(1);
  const auto source = session.allocate({3, 2}, crt::DType::int64);
  const auto target = session.allocate({3, 2}, crt::DType::int64);
  put<std::int64_t>(*source, {1, 2, 3, 4, 5, 6});
  target->copy_rows(*source, 1, 2);
  target->copy_rows(*source, 2, 2);
  CHECK(values_of<std::int64_t>(*target) == std::vector<std::int64_t>{0, 0, 3, 4, 0, 0});
  const auto other = session.allocate({3, 3}, crt::DType::int64);
  CHECK(refused([&] { target->copy_rows(*other, 0, 1); }).find("same shape") != std::string::npos);

  const auto cache = session.allocate({2, 2, 3, 2}, crt::DType::float32);
  put<float>(*cache, std::vector<float>(24, 1.0F));
  cache->clear(1, 1, 3);
  cache->clear(0, 2, 2);
  std::vector<float> expected(24, 1.0F);
  for (const std::size_t head : {std::size_t{12}, std::size_t{18}}) {
    std::fill_n(expected.begin() + static_cast<std::ptrdiff_t>(head) + 2, 4, 0.0F);
  }
  CHECK(values_of<float>(*cache) == expected);
}

TEST_CASE("device buffer: a large one does not take pinned memory") {
  TinySession session(1);
  const auto elements = static_cast<std::int64_t>(crt::kMostPinnedBytes / sizeof(float)) + 1;
  const auto buffer = session.allocate({1, elements}, crt::DType::float32);
  const int pinned = session.device->count("allocate_host");
  CHECK(static_cast<const float*>(buffer->read())[elements - 1] == 0.0F);
  CHECK(session.device->count("allocate_host") == pinned);
}

TEST_CASE("device buffer: a CUDA error reaches the caller") {
  TinySession session(1);
  session.device->fail_at("allocate");
  CHECK(refused([&] { session.allocate({1, 1}, crt::DType::int64); }).find("cudaErrorMadeUp") != std::string::npos);
}
