#include "bundle/sha256.hpp"

#include <openssl/evp.h>

#include <array>

#include "crt_runtime/error.hpp"

namespace crt {

struct Sha256::Context {
  struct Free {
    void operator()(EVP_MD_CTX* context) const noexcept { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> digest{EVP_MD_CTX_new()};
};

namespace {

void check(bool worked) {
  if (!worked) {
    throw Error(ErrorKind::missing_dependency,
                "OpenSSL cannot compute SHA-256 here, which checking a bundle needs; check its configuration");
  }
}

}  // namespace

Sha256::Sha256() : context_(std::make_unique<Context>()) {
  check(context_->digest != nullptr && EVP_DigestInit_ex(context_->digest.get(), EVP_sha256(), nullptr) == 1);
}

Sha256::~Sha256() = default;

void Sha256::update(const void* data, std::size_t bytes) {
  check(EVP_DigestUpdate(context_->digest.get(), data, bytes) == 1);
}

std::string Sha256::hex() {
  std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
  unsigned int length = 0;
  check(EVP_DigestFinal_ex(context_->digest.get(), digest.data(), &length) == 1);
  constexpr const char* digits = "0123456789abcdef";
  std::string text;
  for (unsigned int i = 0; i < length; ++i) {
    text += digits[digest[i] >> 4U];
    text += digits[digest[i] & 15U];
  }
  return text;
}

std::string sha256_hex(const void* data, std::size_t bytes) {
  Sha256 digest;
  digest.update(data, bytes);
  return digest.hex();
}

}  // namespace crt
