#include "session/caches.hpp"

#include <algorithm>
#include <cstring>
#include <utility>

namespace crt {
namespace {

std::size_t size_from(std::int64_t value) { return static_cast<std::size_t>(value); }

std::int64_t length_of(const Buffer& cache) { return cache.shape()[2]; }
std::size_t token_bytes(const Buffer& cache) { return size_from(cache.shape()[3]) * size_of(cache.dtype()); }
std::size_t head_bytes(const Buffer& cache) { return size_from(length_of(cache)) * token_bytes(cache); }
std::size_t head_count(const Buffer& cache) { return size_from(cache.shape()[0] * cache.shape()[1]); }

/// The first bytes of every head, from one memory to another.
void copy_heads(const unsigned char* source, std::size_t source_stride, unsigned char* target,
                std::size_t target_stride, std::size_t heads, std::size_t bytes) {
  for (std::size_t head = 0; bytes > 0 && head < heads; ++head) {
    std::memcpy(target + head * target_stride, source + head * source_stride, bytes);
  }
}

}  // namespace

SessionCaches::SessionCaches(Engine& engine, const TensorSizes& sizes, bool rows_are_independent)
    : engine_(engine),
      sizes_(sizes),
      block_(engine.host_memory() && !engine.fixed_capacity() ? kCacheBlock : sizes.capacity),
      group_rows_(rows_are_independent ? sizes.batch : 1) {
  for (std::size_t index = 0; index < count(); ++index) {
    const std::size_t cache = index / 2;
    index_by_name_[cache_name(index)] = index;
    index_by_name_[index % 2 == 0 ? names::present_key_values_key(cache) : names::present_key_values_value(cache)] = index;
  }
  for (std::int64_t start = 0; start < sizes.batch; start += group_rows_) {
    CacheGroup& group = groups_.emplace_back();
    for (std::size_t index = 0; index < count(); ++index) {
      const CacheSpec& spec = sizes.model.caches[index / 2];
      group.push_back(engine.allocate({group_rows_, spec.heads, rounded(1), spec.head_dim}, sizes.cache_dtype));
    }
  }
  sliding_.resize(size_from(group_rows_));
}

void SessionCaches::reserve(std::int64_t start, std::int64_t stop, std::int64_t tokens) {
  for (std::int64_t group = start / group_rows_; group * group_rows_ < stop; ++group) {
    for (std::unique_ptr<Buffer>& cache : groups_[size_from(group)]) {
      resize(cache, std::max(length_of(*cache), rounded(tokens)));
    }
  }
}

std::optional<BufferSlice> SessionCaches::rows(const std::string& name, std::int64_t start, std::int64_t stop) const {
  const auto found = index_by_name_.find(name);
  if (found == index_by_name_.end()) return std::nullopt;
  const std::int64_t group = start / group_rows_;  // one for all of them, as for the rows of every call
  const std::int64_t first = group * group_rows_;
  return BufferSlice{groups_[size_from(group)][found->second].get(), start - first, stop - first};
}

std::vector<unsigned char> SessionCaches::entries(std::size_t index, std::int64_t length) const {
  const std::size_t wanted = size_from(length) * token_bytes(*groups_.front()[index]);
  std::vector<unsigned char> values(groups_.size() * head_count(*groups_.front()[index]) * wanted, 0);
  std::size_t offset = 0;
  for (const CacheGroup& group : groups_) {
    Buffer& cache = *group[index];
    const std::size_t heads = head_count(cache);
    copy_heads(static_cast<const unsigned char*>(cache.read()), head_bytes(cache), values.data() + offset, wanted,
               heads, std::min(wanted, head_bytes(cache)));
    offset += heads * wanted;
  }
  return values;
}

void SessionCaches::write(const std::vector<const unsigned char*>& caches, std::int64_t length) {
  std::vector<unsigned char> values;
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    for (std::size_t index = 0; index < count(); ++index) {
      Buffer& cache = *with_length(groups_[group][index], rounded(length));
      const std::size_t given = size_from(length) * token_bytes(cache);
      values.assign(cache.bytes(), 0);
      copy_heads(caches[index] + group * head_count(cache) * given, given, values.data(), head_bytes(cache),
                 head_count(cache), given);
      cache.write(values.data());
    }
  }
}

void SessionCaches::assign(const SessionCaches& other) {
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    for (std::size_t index = 0; index < count(); ++index) {
      Buffer& source = *other.groups_[group][index];
      with_length(groups_[group][index], length_of(source))->copy_rows(source, 0, group_rows_);
    }
  }
}

void SessionCaches::slide(const std::vector<std::int64_t>& positions, Window& window) {
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    const auto first = positions.begin() + static_cast<std::ptrdiff_t>(group * sliding_.size());
    std::copy_n(first, sliding_.size(), sliding_.begin());
    if (std::all_of(sliding_.begin(), sliding_.end(), [](std::int64_t position) { return position < 0; })) continue;
    for (std::size_t index = 0; index < count(); ++index) {
      const std::optional<std::size_t>& rotary = sizes_.model.caches[index / 2].rotary;
      const bool turned = index % 2 == 0 && rotary;
      window.slide(*groups_[group][index], sliding_, turned ? &sizes_.model.rotaries[*rotary] : nullptr);
    }
  }
}

void SessionCaches::clear(std::int64_t row, std::int64_t begin, std::int64_t end) {
  for (const std::unique_ptr<Buffer>& cache : groups_[size_from(row / group_rows_)]) {
    const std::int64_t stop = std::min(end, length_of(*cache));
    if (begin < stop) cache->clear(row % group_rows_, begin, stop);
  }
}

void SessionCaches::trim(const std::int64_t* positions) {
  for (std::size_t group = 0; group < groups_.size(); ++group) {
    const std::int64_t* first = positions + static_cast<std::int64_t>(group) * group_rows_;
    const std::int64_t length = rounded(*std::max_element(first, first + group_rows_));
    for (std::unique_ptr<Buffer>& cache : groups_[group]) resize(cache, length);
  }
  for (std::int64_t row = 0; row < sizes_.batch; ++row) clear(row, positions[row], sizes_.capacity);
}

/// Tokens of a cache with room for that many: whole blocks, at least one, at most the capacity.
std::int64_t SessionCaches::rounded(std::int64_t tokens) const noexcept {
  const std::int64_t blocks = std::max<std::int64_t>(1, (tokens + block_ - 1) / block_);
  return std::min(blocks * block_, sizes_.capacity);
}

std::unique_ptr<Buffer> SessionCaches::resized(const Buffer& cache, std::int64_t length) const {
  return engine_.allocate({group_rows_, cache.shape()[1], length, cache.shape()[3]}, cache.dtype());
}

/// The cache, or a new one in its place if it had another length.
Buffer* SessionCaches::with_length(std::unique_ptr<Buffer>& cache, std::int64_t length) {
  if (length_of(*cache) != length) {
    std::unique_ptr<Buffer> other = resized(*cache, length);
    ++moves_;
    cache = std::move(other);
  }
  return cache.get();
}

/// To another length, with what it holds: only ever in host memory, where the address is the content.
void SessionCaches::resize(std::unique_ptr<Buffer>& cache, std::int64_t length) {
  if (length_of(*cache) == length) return;
  const std::unique_ptr<Buffer> old = std::exchange(cache, resized(*cache, length));
  ++moves_;
  copy_heads(static_cast<const unsigned char*>(old->read()), head_bytes(*old),
             static_cast<unsigned char*>(cache->address()), head_bytes(*cache), head_count(*cache),
             std::min(head_bytes(*old), head_bytes(*cache)));
}

}  // namespace crt
