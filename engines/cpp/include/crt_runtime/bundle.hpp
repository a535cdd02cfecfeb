// An opened bundle: the model's configuration, its tokenizer, and sessions on its targets.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "crt_runtime/config.hpp"
#include "crt_runtime/export.h"
#include "crt_runtime/session.hpp"
#include "crt_runtime/tokenizer.hpp"

namespace crt CRT_RUNTIME_API {

/// Sessions of the same target and thread count share the loaded graphs, weights and threads; they keep them alive.
/// Several threads may use one bundle and open sessions at the same time: opening takes its turn.
class Bundle {
 public:
  /// Throws Error(bundle) if there is no bundle, or it is unfinished, damaged, hostile, too new, or unvalidated.
  /// identity: the one that the bundle must have, "" for any; another bundle is refused, expected and found named.
  static Bundle load(const std::string& path, bool allow_unvalidated = false, const std::string& identity = "");
  ~Bundle();
  Bundle(Bundle&&) noexcept;
  Bundle& operator=(Bundle&&) noexcept;

  const std::string& path() const noexcept;
  /// SHA-256 of manifest.json, hex: what snapshots are bound to.
  const std::string& identity() const noexcept;
  const ModelConfig& config() const noexcept;
  const std::vector<std::string>& targets() const noexcept;
  /// The first target that this library runs on a CPU, else on a GPU. Throws Error(unsupported) if there is none.
  std::string default_target() const;
  /// Throws Error(unsupported) if the model does not read bytes.
  ByteTokenizer tokenizer() const;

  /// Throws Error of kind input, unsupported, missing_dependency, bundle or contract, as bundle.session() in Python.
  Session session(const std::string& target, const SessionOptions& options = {});

 private:
  class CRT_RUNTIME_LOCAL Impl;
  explicit Bundle(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace crt
