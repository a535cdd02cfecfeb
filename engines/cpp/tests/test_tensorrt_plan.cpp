// What may be bound to a TensorRT engine, and what is said about the rest.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>

#include "tensorrt/tensorrt_plan.hpp"
#include "tiny_session.hpp"

namespace {

using crt_test::TinySession;

std::string refusal_of(TinySession& session, const crt::Binding& inputs, const crt::Binding& outputs) {
  return crt_test::refused([&] { crt::BindingPlan(*session.engine, inputs, outputs); });
}

bool has(const std::string& text, const std::string& part) {
  INFO(text);
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("tensorrt plan: a cache must be bound in place, everything else must not share memory") {
  TinySession session(2);
  const auto other = session.allocate({2, 1, 7, 1}, crt::DType::float32);
  crt::Binding outputs = session.outputs(0, 2, 0);
  outputs["present_key_values.0.key"] = {other.get(), 0, 2};
  CHECK(has(refusal_of(session, session.inputs(0, 2, 0), outputs),
            "present_key_values.0.key must be at the address of past_key_values.0.key"));

  outputs = session.outputs(0, 2, 0);
  outputs["next_state"] = {session.state[0].get(), 0, 2};
  CHECK(has(refusal_of(session, session.inputs(0, 2, 0), outputs), "next_state shares memory with state"));

  // Rows 0 and 1 of one buffer against rows 1 and 2: the overlap of a single row is one too.
  TinySession larger(3);
  crt::Binding shifted = larger.outputs(1, 3, 0);
  shifted["next_state"] = {larger.state[0].get(), 0, 2};
  CHECK(has(refusal_of(larger, larger.inputs(1, 3, 0), shifted), "next_state shares memory with state"));

  outputs = session.outputs(0, 2, 0);
  outputs["next_position"] = {session.ids[1].get(), 0, 2};  // int64 [2, 1] does not fit [2] either
  CHECK(has(refusal_of(session, session.inputs(0, 2, 0), outputs), "next_position must have shape [-1], found [2, 1]"));
}

TEST_CASE("tensorrt plan: every problem is listed at once") {
  TinySession session(2);
  crt::Binding inputs = session.inputs(0, 2, 0);
  crt::Binding outputs = session.outputs(0, 2, 0);
  inputs.erase("state");
  inputs["hidden"] = {session.state[0].get(), 0, 2};
  inputs["position"] = {session.state[0].get(), 0, 2};
  outputs["next_token"] = {session.ids[1].get(), 1, 3};
  const std::string text = refusal_of(session, inputs, outputs);
  CHECK(has(text, "tiny step: the bound tensors: 5 problems"));
  CHECK(has(text, "input state is missing"));
  CHECK(has(text, "hidden is no input of the engine"));
  CHECK(has(text, "position must be int64, found float32"));
  CHECK(has(text, "position must have shape [1] to [4], found [2, 1, 5]"));
  CHECK(has(text, "next_token: rows 1 to 3 are no rows of its buffer"));
}

TEST_CASE("tensorrt plan: a batch outside the engine's profile is refused before TensorRT sees it") {
  TinySession session(5);
  CHECK(has(refusal_of(session, session.inputs(0, 5, 0), session.outputs(0, 5, 0)),
            "input_ids must have shape [1, 1] to [4, 1], found [5, 1]"));
  CHECK(refusal_of(session, session.inputs(0, 4, 0), session.outputs(0, 4, 0)).empty());
}

TEST_CASE("tensorrt plan: an address that TensorRT would refuse is staged, a cache once for both of its names") {
  TinySession session(3);
  crt::BindingPlan plan(*session.engine, session.inputs(1, 2, 0), session.outputs(1, 2, 0));
  const int before = session.device->count("allocate");
  plan.place(session.device);
  CHECK(session.device->count("allocate") - before == 7);  // eight tensors, the cache has two names
  for (const crt::PlannedTensor& tensor : plan.tensors()) {
    CAPTURE(tensor.name);
    CHECK(reinterpret_cast<std::uintptr_t>(tensor.bound) % crt::kAddressAlignment == 0);
    CHECK(tensor.bound != tensor.home);
  }
  crt::BindingPlan whole(*session.engine, session.inputs(0, 3, 0), session.outputs(0, 3, 0));
  whole.place(session.device);
  CHECK(session.device->count("allocate") - before == 7);  // a batch from its first row on needs no staging
}
