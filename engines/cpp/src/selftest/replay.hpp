// Feed the tokens of the vectors to a session, through its public calls only, and compare what it gives with them.
// The C++ twin of crt_export/selftest/replay.py.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "crt_runtime/selftest.hpp"
#include "crt_runtime/session.hpp"
#include "selftest/vectors.hpp"

namespace crt {

enum class Feed {
  step,          ///< token by token
  prefill,       ///< as many passes as the bundle was built with
  prefill_pass,  ///< as many single passes as a chunk has tokens, which is the exact recurrence
};

const char* feed_name(Feed feed) noexcept;

struct Feeding {
  Feed by = Feed::step;
  std::int64_t chunk = 1;  ///< most tokens per call of prefill
  std::int64_t steps = 0;  ///< steps after the prompt
  /// Passes of Feed::prefill; 0 where the unrolled graph makes them and is the target's own choice.
  std::int64_t passes = 0;
};

/// One cache of a session of one row, [heads, tokens, head_dim] as float32.
struct ObservedCache {
  std::string name;       ///< past_key_values.{i}.key or .value
  bool is_value = false;  ///< or a key
  std::vector<std::int64_t> shape;
  std::vector<float> values;
};

/// What a session holds after the prompt (index 0) or after step index.
struct Observed {
  std::int64_t index = 0;
  std::vector<float> logits;
  std::int64_t next_token = 0;
  std::vector<std::pair<std::string, std::vector<float>>> states;  ///< by the name of the graphs' input
  std::vector<ObservedCache> caches;
};

/// Run a session of one row from its start, looking at it after the prompt and after every step.
void replay(Session& session, const SelftestVectors& vectors, const Feeding& feeding,
            const std::function<void(Observed)>& look);

/// Where in a run an index is: "after step 3".
std::string place(const SelftestVectors& vectors, std::int64_t index, const char* preposition = "after");

/// Collects the errors of one replay.
class Comparison {
 public:
  /// limit: largest |difference| over the largest |value| of the vectors.
  Comparison(const SelftestVectors& vectors, std::string run, std::string precision, double limit);

  /// Compare logits, states and next token of one index.
  void add(const Observed& observed);
  /// Compare the caches: one entry per token so far.
  void add_caches(const Observed& observed);

  /// The largest error of every tensor.
  std::vector<SelftestTensor> tensors() const;
  /// A sentence on every tensor that is off.
  std::vector<std::string> failures() const;

 private:
  struct Largest {
    std::string tensor;
    double error = 0.0;
    std::string where;
    std::string first;  ///< the first one beyond the limit, as a sentence
    std::int64_t beyond = 0;
  };

  /// Largest |value| of a tensor in the run, of all its steps: what an error is relative to.
  double scale_of(const std::string& tensor) const;
  void record(const std::string& tensor, double difference, const std::string& where);
  void check_token(const Observed& observed);

  const SelftestVectors& vectors_;
  std::string run_;
  std::string precision_;
  double limit_;
  std::vector<Largest> largest_;
  std::vector<std::string> tokens_;
  std::vector<std::string> missing_;
};

/// A number with three significant digits, alike in every locale.
std::string three_digits(double value);

}  // namespace crt
