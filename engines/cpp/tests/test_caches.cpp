// Caches that grow with their rows, and steps through the graph of one pass, on a model that can be computed by hand.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "crt_runtime/error.hpp"
#include "crt_runtime/session.hpp"
#include "engine/tensor_names.hpp"
#include "toy_engine.hpp"

namespace {

using crt::kCacheBlock;
using crt_test::ToyControl;
using crt_test::ToyRow;
using crt_test::by_passes;

constexpr std::int64_t kCapacity = 3 * kCacheBlock - 40;  // the last block is a short one

struct Toy {
  explicit Toy(std::int64_t batch, bool rows_are_independent = true, const std::function<void(ToyControl&)>& change = {})
      : control(std::make_shared<ToyControl>()) {
    control->max_tokens = kCapacity;
    if (change) {
      change(*control);
    }
    crt::SessionSetup setup = crt_test::toy_setup(batch, kCapacity);
    setup.rows_are_independent = rows_are_independent;
    setup.sizes.unroll = 3;
    decoder = std::make_unique<crt::Decoder>(crt_test::make_toy_engine(control), setup);
  }
  /// Tokens that the cache of a row has room for.
  std::int64_t room(std::int64_t row) {
    return decoder->tensors().caches().rows(crt::names::past_key_values_key(0), row, row + 1)->buffer->shape()[2];
  }
  void step(std::int64_t token) { decoder->step({token}, {1}, true); }

  std::shared_ptr<ToyControl> control;
  std::unique_ptr<crt::Decoder> decoder;
};

std::vector<std::int64_t> many_tokens(std::int64_t count) {
  std::vector<std::int64_t> tokens;
  for (std::int64_t index = 0; index < count; ++index) {
    tokens.push_back((index * index + 3) % crt_test::kToyVocab);
  }
  return tokens;
}

}  // namespace

TEST_CASE("caches: they grow block by block up to the capacity, and keep what they hold") {
  Toy toy(1);
  ToyRow alone;
  for (const std::int64_t token : many_tokens(kCapacity)) {
    toy.step(token);
    alone.feed({token});
    const auto held = static_cast<std::int64_t>(alone.keys.size());
    const std::int64_t blocks = (held + kCacheBlock - 1) / kCacheBlock;
    CHECK(toy.room(0) == std::min(blocks * kCacheBlock, kCapacity));
    CHECK(toy.decoder->next_tokens()[0] == alone.next_token());
  }
}

TEST_CASE("caches: a prefill makes room for its padding at once; reset gives back what nobody needs") {
  Toy toy(2);
  toy.decoder->prefill({many_tokens(20), many_tokens(200)}, by_passes(0, kCapacity));
  CHECK(toy.room(0) == 2 * kCacheBlock);
  ToyRow alone;
  alone.feed(many_tokens(20));
  CHECK(toy.decoder->next_tokens()[0] == alone.next_token());
  const std::vector<float> keys = crt_test::floats_of(toy.decoder->tensors().caches().entries(0, kCapacity));
  CHECK(keys.size() == static_cast<std::size_t>(2 * kCapacity * 2));  // with zeros where nothing is kept
  CHECK(std::all_of(keys.begin() + 2 * 20, keys.begin() + 2 * kCapacity, [](float key) { return key == 0.0F; }));
  toy.decoder->reset();
  CHECK(toy.room(1) == kCacheBlock);
  toy.decoder->prefill({many_tokens(20), {}}, by_passes(0, kCapacity));
  CHECK(toy.decoder->next_tokens()[0] == alone.next_token());
}

TEST_CASE("caches: rows that run alone have caches of their own") {
  Toy toy(2, false);
  toy.decoder->prefill({many_tokens(20), many_tokens(200)}, by_passes(0, kCapacity));
  CHECK(toy.room(0) == kCacheBlock);
  CHECK(toy.room(1) == 2 * kCacheBlock);
  ToyRow alone;
  alone.feed(many_tokens(200));
  CHECK(toy.decoder->next_tokens()[1] == alone.next_token());
  Toy fork(2, false);
  fork.decoder->assign(*toy.decoder);
  fork.decoder->step({5, 6}, {1, 1}, true);
  alone.feed({6});
  CHECK(fork.decoder->next_tokens()[1] == alone.next_token());
  CHECK(fork.room(1) == 2 * kCacheBlock);
}

TEST_CASE("caches: where the engine computes in memory of its own they have their full size from the start") {
  Toy toy(1, true, [](ToyControl& control) { control.host_memory = false; });
  CHECK(toy.room(0) == kCapacity);
  toy.step(3);
  toy.step(4);
  CHECK(toy.decoder->tensors().launches() == 2);
  toy.decoder->reset();
  CHECK(toy.decoder->tensors().launches() == 2);  // nothing moved, so captured graphs stay
}

TEST_CASE("caches: each has its own heads and channels, and keys that nothing turned only move") {
  crt::TensorSizes sizes = crt_test::toy_setup(2, kCapacity).sizes;
  sizes.model.caches.push_back({"1", 3, 4, 8, {}});
  const std::shared_ptr<crt::Engine> engine = crt_test::make_toy_engine(std::make_shared<ToyControl>());
  crt::SessionCaches caches(*engine, sizes, false);
  REQUIRE(caches.count() == 4);
  std::vector<std::vector<unsigned char>> given;
  std::vector<const unsigned char*> addresses;
  for (const std::size_t values : {2U * 6 * 2, 2U * 6 * 2, 2U * 3 * 6 * 4, 2U * 3 * 6 * 4}) {  // six tokens of two rows
    std::vector<float> numbers;
    while (numbers.size() < values) numbers.push_back(static_cast<float>(numbers.size()));
    const auto* bytes = reinterpret_cast<const unsigned char*>(numbers.data());
    given.emplace_back(bytes, bytes + numbers.size() * sizeof(float));
  }
  for (const std::vector<unsigned char>& bytes : given) addresses.push_back(bytes.data());
  caches.write(addresses, 6);
  for (std::size_t index = 0; index < given.size(); ++index) CHECK(caches.entries(index, 6) == given[index]);
  CHECK(caches.rows(crt::names::present_key_values_value(1), 1, 2)->buffer->shape() ==
        crt::Shape{1, 3, kCacheBlock, 4});
  crt::Window window(4);
  caches.slide({-1, 6}, window);
  const std::vector<float> turned = crt_test::floats_of(caches.entries(0, 6));
  CHECK(turned[11] == 11.0F);                                                             // row 0 did not slide
  CHECK(turned[12] == doctest::Approx(18.0 * std::cos(3.0) + 19.0 * std::sin(3.0)));  // its token 3, by 3 positions
  const std::vector<float> moved = crt_test::floats_of(caches.entries(2, 6));
  CHECK(moved[72] == 72.0F + 3 * 4);
  CHECK(moved[72 + 3 * 4] == 0.0F);
}

TEST_CASE("one graph: steps are passes over one token, and a prefill makes as many passes as the bundle was built with") {
  Toy toy(1, true, [](ToyControl& control) { control.one_graph = true; });
  ToyRow alone;
  for (const std::int64_t token : many_tokens(5)) {
    toy.step(token);
    alone.feed({token});
    CHECK(toy.decoder->next_tokens()[0] == alone.next_token());
  }
  CHECK(toy.control->passes == 5);
  toy.decoder->prefill({many_tokens(4)}, by_passes(0, kCapacity));
  CHECK(toy.control->passes == 8);
  alone.feed(many_tokens(4));
  CHECK(toy.decoder->next_tokens()[0] == alone.next_token());
}
