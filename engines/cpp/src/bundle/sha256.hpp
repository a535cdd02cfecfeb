// SHA-256 of memory and streams.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace crt {

class Sha256 {
 public:
  /// Throws Error(missing_dependency) if OpenSSL has no SHA-256 (a misconfigured FIPS provider).
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void update(const void* data, std::size_t bytes);
  /// The digest in lower-case hex; call it once.
  std::string hex();

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

std::string sha256_hex(const void* data, std::size_t bytes);

}  // namespace crt
