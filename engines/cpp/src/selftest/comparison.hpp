// Compare what a session gives with the vectors of one run: the twin of crt_export/selftest/run.py.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "crt_runtime/selftest.hpp"
#include "selftest/replay.hpp"
#include "selftest/vectors.hpp"

namespace crt {

/// Collects the errors of one replay.
class Comparison {
 public:
  /// limit: largest |difference| over the largest |value| of the vectors.
  Comparison(const SelftestVectors& vectors, std::string run, std::string precision, double limit);

  /// Compare logits, state and next token of one index.
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
