// Sessions that slide, on a model with an attention window.
#include <doctest/doctest.h>

#include "crt_runtime/session.hpp"
#include "given_bundle.hpp"

namespace {

using crt_test::distance;
using crt_test::row_of;
using crt_test::some_tokens;

crt::Session open(crt::Bundle& bundle, std::int64_t capacity, crt::OnFull on_full) {
  crt::SessionOptions options;
  options.capacity = capacity;
  options.on_full = on_full;
  return bundle.session("ort-cpu-fp32", options);
}

}  // namespace

TEST_CASE("window: steps of a session that slides give what one with room for everything gives") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_WINDOW_BUNDLE");
  REQUIRE(bundle.config().window().has_value());
  const std::int64_t window = *bundle.config().window();
  crt::Session roomy = open(bundle, 60, crt::OnFull::error);
  crt::Session sliding = open(bundle, window + 3, crt::OnFull::slide);
  const std::int64_t vocab = roomy.vocab_size();
  std::int64_t slides = 0;
  for (const std::int64_t token : some_tokens(50)) {
    const std::int64_t before = sliding.position()[0];
    const std::vector<float> found = row_of(sliding.step({token}), 0, vocab);
    CHECK(distance(found, row_of(roomy.step({token}), 0, vocab)) <= 1e-4);
    slides += sliding.position()[0] <= before ? 1 : 0;
  }
  CHECK(slides >= 10);
  CHECK(sliding.position()[0] <= sliding.capacity());
}

TEST_CASE("window: a prefill longer than the capacity is cut into chunks that fit") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_WINDOW_BUNDLE");
  const std::int64_t window = *bundle.config().window();
  crt::Session roomy = open(bundle, 60, crt::OnFull::error);
  crt::Session sliding = open(bundle, window + 3, crt::OnFull::slide);
  crt::PrefillOptions cut;
  cut.chunk = 4;  // what a slide leaves free: capacity - (window - 1)
  const std::vector<float> wanted = row_of(roomy.prefill({some_tokens(30)}, cut), 0, roomy.vocab_size());
  CHECK(distance(row_of(sliding.prefill({some_tokens(30)}), 0, roomy.vocab_size()), wanted) <= 1e-4);
  cut.chunk = 5;
  CHECK(crt_test::contains(crt_test::error_text(crt::ErrorKind::input, [&] { sliding.prefill({{40}}, cut); }),
                           "chunk must be at least 1 and at most 4"));
}

TEST_CASE("window: a capacity below the window is refused") {
  CRT_OPEN_BUNDLE(bundle, "CRT_TEST_WINDOW_BUNDLE");
  const std::int64_t window = *bundle.config().window();
  CHECK(crt_test::contains(
      crt_test::error_text(crt::ErrorKind::input, [&] { open(bundle, window - 1, crt::OnFull::slide); }),
      "needs a capacity of at least " + std::to_string(window) + ", the attention window of "));
}
