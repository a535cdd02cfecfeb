// What feeds an engine, on a model that can be computed by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>

#include "crt_runtime/error.hpp"
#include "crt_runtime/session.hpp"
#include "toy_engine.hpp"

namespace {

using crt::kNoToken;
using crt_test::ToyControl;
using crt_test::ToyRow;
using crt_test::by_passes;
using BufferSlice = std::vector<std::vector<std::int64_t>>;

struct Toy {
  explicit Toy(std::int64_t batch, std::int64_t capacity = 12)
      : control(std::make_shared<ToyControl>()),
        decoder(crt_test::make_toy_engine(control), crt_test::toy_setup(batch, capacity)) {}

  void step(const std::vector<std::int64_t>& tokens, bool check_logits = true) {
    std::vector<std::int64_t> ids(tokens);
    std::vector<std::int64_t> lengths;
    for (std::int64_t& id : ids) {
      lengths.push_back(id == kNoToken ? 0 : 1);
      id = id == kNoToken ? 0 : id;
    }
    decoder.step(ids, lengths, check_logits);
  }

  std::shared_ptr<ToyControl> control;
  crt::Decoder decoder;
};

/// The first entries of a cache of the one layer: 0 for its keys, 1 for its values.
std::vector<float> cache_of(crt::Decoder& decoder, std::size_t index, std::int64_t length) {
  return crt_test::floats_of(decoder.tensors().caches().entries(index, length));
}

std::string text_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const crt::Error& error) {
    CHECK(error.kind() == crt::ErrorKind::contract);
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("decoder: rows in company go on as each would alone, whatever takes part in a call") {
  Toy toy(3);
  std::vector<ToyRow> alone(3);
  const auto feed = [&](const BufferSlice& rows, bool as_step) {
    if (as_step) {
      std::vector<std::int64_t> tokens;
      for (const auto& row : rows) {
        tokens.push_back(row.empty() ? kNoToken : row[0]);
      }
      toy.step(tokens);
    } else {
      toy.decoder.prefill(rows, by_passes(0, 16));
    }
    for (std::size_t row = 0; row < rows.size(); ++row) {
      alone[row].feed(rows[row]);
      CHECK(toy.decoder.position()[row] == static_cast<std::int64_t>(alone[row].keys.size()));
      CHECK(toy.decoder.next_tokens()[row] == (alone[row].keys.empty() ? kNoToken : alone[row].next_token()));
      CHECK(std::isnan(toy.decoder.logits()[row * 11]) == alone[row].keys.empty());
    }
  };
  feed({{1, 2, 3}, {}, {4}}, false);
  feed({{5}, {}, {6}}, true);
  feed({{}, {}, {7}}, true);
  feed({{}, {8, 9}, {}}, false);
  feed({{1}, {2}, {3}}, true);
  feed({{4, 5, 6, 7}, {1}, {}}, false);
  feed({{}, {3}, {4}}, true);
}

TEST_CASE("decoder: a step that is fed what the last one left uploads nothing") {
  Toy toy(2);
  toy.decoder.prefill({{1, 2}, {3}}, by_passes(0, 16));
  toy.control->writes = 0;
  for (int index = 0; index < 6; ++index) {
    toy.step({toy.decoder.next_tokens()[0], toy.decoder.next_tokens()[1]}, false);
  }
  CHECK(toy.control->writes == 0);
  CHECK(toy.decoder.tensors().launches() == 2);
  toy.step({(toy.decoder.next_tokens()[0] + 1) % 11, toy.decoder.next_tokens()[1]}, false);
  CHECK(toy.control->writes == 1);  // one id differs, the positions do not
}

TEST_CASE("decoder: padding never passes the capacity and leaves nothing behind") {
  Toy toy(2, 6);
  toy.decoder.prefill({{1, 2, 3, 4, 5}, {1}}, by_passes(0, 16));
  toy.control->runs = 0;
  toy.decoder.prefill({{6}, {2, 3, 4, 5}}, by_passes(0, 16));  // padding row 0 to four would need nine of six
  CHECK(toy.control->runs == 2);
  CHECK(toy.decoder.position() == std::vector<std::int64_t>{6, 5});
  const std::vector<float> keys = cache_of(toy.decoder, 0, toy.decoder.tensors().sizes().capacity);
  for (std::size_t at = 0; at < keys.size(); at += 2) {
    CHECK((keys[at] != 0.0F) == (at != 22));  // the only entry that holds no token
    CHECK(keys[at + 1] == (at < 12 ? static_cast<float>(at / 2) : at == 22 ? 0.0F : static_cast<float>(at / 2 - 6)));
  }
}

TEST_CASE("decoder: chunks are cut at multiples of a row's own tokens, and passes run that many times per chunk") {
  Toy toy(2);
  ToyRow alone;
  alone.feed({1, 2, 3, 4, 5, 6, 7});
  toy.decoder.prefill({{1, 2, 3, 4, 5, 6, 7}, {1, 2}}, by_passes(0, 3));
  CHECK(toy.control->runs == 4);  // in host memory rows of unequal length are not padded, and do not share a call
  CHECK(toy.decoder.next_tokens()[0] == alone.next_token());
  toy.decoder.reset();
  toy.decoder.prefill({{1, 2, 3, 4, 5, 6, 7}, {}}, by_passes(4, 3));
  CHECK(toy.control->passes == 3 + 3 + 1);  // no more than a chunk has tokens
  CHECK(toy.decoder.next_tokens()[0] == alone.next_token());
}

TEST_CASE("decoder: a state that is not finite is refused with its row and position, and abandoning leaves zeros") {
  Toy toy(2);
  toy.control->overflowing = 7;
  toy.decoder.prefill({{1, 2, 3}, {1, 2}}, by_passes(0, 16));
  const std::vector<std::int64_t> before = toy.decoder.position();
  CHECK(text_of([&] { toy.step({4, 7}); }) == "toy: state is not finite: row 1 after position 2");
  CHECK(text_of([&] { toy.decoder.prefill({{7}, {7, 1}}, by_passes(0, 16)); })
            .find("2 problems\n  - row 0 after position 3") != std::string::npos);
  toy.decoder.abandon(before);
  const std::vector<float> keys = cache_of(toy.decoder, 0, toy.decoder.tensors().sizes().capacity);
  for (std::size_t at = 0; at < 24; ++at) {
    CHECK((at < 6 || keys[at] == 0.0F));
    CHECK((at < 4 || keys[24 + at] == 0.0F));
  }
  toy.decoder.reset();
  toy.decoder.prefill({{1}, {2}}, by_passes(0, 16));
  CHECK(toy.decoder.logits()[0] <= 0.0F);
}

TEST_CASE("decoder: away from host memory, spoiled logits are found when they are read, and at once by a step") {
  Toy toy(1);
  toy.control->host_memory = false;
  toy.control->spoiled_logits = 5;
  toy.step({1});
  toy.step({5}, false);
  CHECK(text_of([&] { toy.decoder.logits(); }) == "toy: logits is not finite: row 0 after position 1");
  CHECK(text_of([&] { toy.step({5}); }) == "toy: logits is not finite: row 0 after position 2");
  toy.control->host_memory = true;
  toy.decoder.reset();
  CHECK(text_of([&] { toy.step({5}, false); }) == "toy: logits is not finite: row 0 after position 0");
}

TEST_CASE("decoder: rows that may not share a call run one at a time") {
  const auto control = std::make_shared<ToyControl>();
  crt::SessionSetup setup = crt_test::toy_setup(3, 12);
  setup.rows_are_independent = false;
  crt::Decoder decoder(crt_test::make_toy_engine(control), setup);
  decoder.step({1, 2, 3}, {1, 1, 1}, true);
  CHECK(control->runs == 3);
  decoder.step({1, 0, 3}, {1, 0, 1}, true);
  CHECK(control->runs == 5);
  Toy together(3);
  together.step({1, 2, 3});
  CHECK(together.control->runs == 1);
}

TEST_CASE("decoder: a full row slides to what its window sees, and others stay") {
  auto control = std::make_shared<ToyControl>();
  crt::SessionSetup setup = crt_test::toy_setup(2, 8);
  setup.slides = true;
  setup.sizes.model.caches[0].window = 4;
  crt::Decoder decoder(crt_test::make_toy_engine(control), setup);
  CHECK(decoder.max_chunk() == 5);
  decoder.prefill({{1, 2, 3, 4, 5, 6, 7}, {9}}, by_passes(0, 5));
  CHECK(decoder.position() == std::vector<std::int64_t>{7, 1});
  decoder.prefill({{8, 9}, {}}, by_passes(0, 5));
  CHECK(decoder.position() == std::vector<std::int64_t>{5, 1});
  const std::vector<float> values = cache_of(decoder, 1, 8);
  for (const auto& [at, token] : std::vector<std::pair<int, int>>{{0, 5}, {1, 6}, {2, 7}, {3, 8}, {4, 9}}) {
    CHECK(values[2 * at + 1] == static_cast<float>(token));
  }
  for (int at = 10; at < 16; ++at) {
    CHECK(values[at] == 0.0F);
  }
  CHECK(values[16 + 1] == 9.0F);
}
