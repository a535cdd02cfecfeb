// The key and value caches of a session: as long as its rows need, in blocks, up to the capacity. The C++ twin of
// crt_export/runtime/caches.py, which says why.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "crt_runtime/config.hpp"
#include "engine/engine.hpp"
#include "engine/tensor_names.hpp"
#include "session/slide.hpp"

namespace crt {

/// Sizes of a session.
struct TensorSizes {
  std::int64_t batch = 0;
  std::int64_t capacity = 0;
  ModelConfig model;
  DType cache_dtype = DType::float32;
  std::int64_t unroll = 0;  ///< passes of a prefill for which nobody asked for a number; 0 where one pass is exact
};

/// Tokens that a cache in host memory grows by.
inline constexpr std::int64_t kCacheBlock = 128;

/// What graphs and snapshots call a cache; counted from 0, keys and values of each of the model's in turn.
inline std::string cache_name(std::size_t index) {
  return index % 2 == 0 ? names::past_key_values_key(index / 2) : names::past_key_values_value(index / 2);
}

/// Every cache of a session.
class SessionCaches {
 public:
  /// Allocates the first block of every cache, zeroed; all of it where the engine computes in memory of its own.
  /// rows_are_independent: whether rows may share a call of the engine, hence a cache.
  SessionCaches(Engine& engine, const TensorSizes& sizes, bool rows_are_independent);

  std::size_t count() const noexcept { return 2 * sizes_.model.caches.size(); }
  /// Counts up whenever memory moves: what was bound to the caches before must not run any more.
  std::uint64_t moves() const noexcept { return moves_; }
  /// Make room for that many tokens in each of these rows. After std::bad_alloc it can be repeated.
  void reserve(std::int64_t start, std::int64_t stop, std::int64_t tokens);
  /// Rows of the cache that a graph's tensor of this name is bound to; unset if it is none.
  std::optional<BufferSlice> rows(const std::string& name, std::int64_t start, std::int64_t stop) const;

  /// Copy of the first length entries of a cache, [batch, heads, length, head_dim]; zeros where none are kept.
  std::vector<unsigned char> entries(std::size_t index, std::int64_t length) const;
  /// Replace everything by such entries of every cache; zeros follow them.
  void write(const std::vector<const unsigned char*>& caches, std::int64_t length);
  /// Take everything from the caches of another session of the same sizes.
  void assign(const SessionCaches& other);
  /// Move the latest tokens of some rows to the front; positions as in Window::slide().
  void slide(const std::vector<std::int64_t>& positions, Window& window);
  /// Zero the entries begin to end of one row, as far as they are kept.
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end);
  /// Give back what no row needs, and zero every entry beyond the positions.
  void trim(const std::int64_t* positions);

 private:
  /// Neighbouring rows that share a cache.
  using CacheGroup = std::vector<std::unique_ptr<Buffer>>;

  std::int64_t rounded(std::int64_t tokens) const noexcept;
  std::unique_ptr<Buffer> resized(const Buffer& cache, std::int64_t length) const;
  Buffer* with_length(std::unique_ptr<Buffer>& cache, std::int64_t length);
  void resize(std::unique_ptr<Buffer>& cache, std::int64_t length);

  Engine& engine_;
  TensorSizes sizes_;
  std::int64_t block_;
  std::int64_t group_rows_;
  std::uint64_t moves_ = 0;
  std::vector<CacheGroup> groups_;
  std::map<std::string, std::size_t> index_by_name_;
  std::vector<std::int64_t> sliding_;  // scratch of slide()
};

}  // namespace crt
