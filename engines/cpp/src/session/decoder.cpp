#include "session/decoder.hpp"

#include <algorithm>
#include <exception>
#include <utility>

#include "crt_runtime/error.hpp"
#include "crt_runtime/session.hpp"
#include "engine/tensor_names.hpp"
#include "session/floats.hpp"
#include "text/messages.hpp"

namespace crt {

Decoder::Decoder(std::shared_ptr<Engine> engine, const SessionSetup& setup)
    : engine_(std::move(engine)),
      target_(setup.target),
      tensors_(*engine_, setup.sizes, setup.rows_are_independent),
      sizes_(tensors_.sizes()),
      vocab_(static_cast<std::size_t>(sizes_.model.vocab)),
      max_chunk_(engine_->max_tokens()),
      rows_are_independent_(setup.rows_are_independent),
      plan_(setup.plan) {
  if (setup.slides) {
    window_.emplace(sizes_.model.window().value());
    // What a slide keeps and a chunk always fit together. The limit holds from the first chunk on, so that chunks are
    // cut alike however full a row is.
    max_chunk_ = std::min(max_chunk_, sizes_.capacity - (window_->size() - 1));
  }
  const auto batch = static_cast<std::size_t>(sizes_.batch);
  position_.assign(batch, 0);
  next_tokens_.assign(batch, kNoToken);
  sliding_.assign(batch, -1);
  zeros_.assign(batch, 0);
  batches_.reserve(batch);
}

void Decoder::check_room(const std::vector<std::int64_t>& lengths) const {
  if (!window_) check_capacity(position_, lengths, sizes_.capacity);
}

PrefillRule Decoder::rule_of(const PrefillOptions& options) {
  const PrefillRule rule = prefill_rule(plan_, options, max_chunk_, sizes_.model.iterated, sizes_.unroll, target_);
  if (rule.passes > 0) static_cast<void>(engine_->program(names::kGraphPrefillPass));
  return rule;
}

void Decoder::prefill(const std::vector<std::vector<std::int64_t>>& rows, const PrefillRule& rule) {
  std::size_t longest = 0;
  for (const std::vector<std::int64_t>& row : rows) longest = std::max(longest, row.size());
  std::vector<RowTokens> by_steps(rows.size());
  std::vector<RowTokens> by_passes(rows.size());
  for (std::size_t begin = 0; begin < longest; begin += static_cast<std::size_t>(rule.chunk)) {
    for (std::size_t row = 0; row < rows.size(); ++row) {
      const std::size_t start = std::min(begin, rows[row].size());
      const std::int64_t length = std::min(static_cast<std::int64_t>(rows[row].size() - start), rule.chunk);
      const RowTokens piece{rows[row].data() + start, length};
      by_steps[row] = length < rule.shortest ? piece : RowTokens();
      by_passes[row] = length < rule.shortest ? RowTokens() : piece;
    }
    feed_steps(by_steps);
    feed_passes(by_passes, rule);
  }
}

void Decoder::feed_steps(const std::vector<RowTokens>& pieces) {
  std::int64_t longest = 0;
  for (const RowTokens& piece : pieces) longest = std::max(longest, piece.count);
  std::vector<std::int64_t> ids(pieces.size());
  std::vector<std::int64_t> lengths(pieces.size());
  for (std::int64_t index = 0; index < longest; ++index) {
    for (std::size_t row = 0; row < pieces.size(); ++row) {
      lengths[row] = index < pieces[row].count ? 1 : 0;
      ids[row] = lengths[row] == 1 ? pieces[row].tokens[index] : 0;
    }
    step(ids, lengths, false);
  }
}

void Decoder::feed_passes(const std::vector<RowTokens>& pieces, const PrefillRule& rule) {
  std::vector<std::int64_t> lengths;
  std::vector<float> residual(pieces.size());
  for (const RowTokens& piece : pieces) lengths.push_back(piece.count);
  // How many passes a row takes until its residual is small must not depend on its neighbours.
  set_batches(lengths, rows_are_independent_ && !rule.bound);
  if (batches_.empty()) return;
  tensors_.prefill(pieces, position_.data(), batches_, rule.passes, rule.bound, residual);
  if (sizes_.model.iterated) refuse_non_finite("residual", residual.data(), 1, lengths);
  finish(lengths, true);
}

void Decoder::step(const std::vector<std::int64_t>& ids, const std::vector<std::int64_t>& lengths, bool check_logits) {
  set_batches(lengths, rows_are_independent_);
  tensors_.step(ids.data(), position_.data(), batches_);
  finish(lengths, check_logits);
}

const float* Decoder::logits() {
  const float* values = tensors_.logits();
  if (!logits_checked_) {
    batches_.clear();
    for (std::size_t row = 0; row < position_.size(); ++row) {
      if (position_[row] > 0) {
        const auto number = static_cast<std::int64_t>(row);
        batches_.push_back(Batch{number, number + 1, 1});
      }
    }
    refuse_non_finite("logits", values, vocab_, zeros_);
    logits_checked_ = true;
  }
  return values;
}

void Decoder::assign(Decoder& other) {
  tensors_.assign(other.tensors_);
  position_ = other.position_;
  next_tokens_ = other.next_tokens_;
  logits_checked_ = other.logits_checked_;
}

void Decoder::resume(const std::vector<std::int64_t>& position, const std::vector<std::int64_t>& next_tokens) {
  tensors_.clear(position.data());
  for (std::size_t row = 0; row < position_.size(); ++row) {
    position_[row] = position[row];
    next_tokens_[row] = position[row] > 0 ? next_tokens[row] : kNoToken;
  }
  logits_checked_ = true;
}

void Decoder::reset() {
  std::fill(position_.begin(), position_.end(), 0);
  std::fill(next_tokens_.begin(), next_tokens_.end(), kNoToken);
  tensors_.clear(position_.data());
  logits_checked_ = true;
}

void Decoder::abandon(const std::vector<std::int64_t>& before) noexcept {
  for (std::size_t row = 0; row < position_.size(); ++row) position_[row] = std::min(position_[row], before[row]);
  try {
    tensors_.clear(position_.data());
  } catch (const std::exception&) {
    // An engine that fails may fail here too. The first failure is the one to report, and what lifts it clears again.
  }
}

/// The rows that run together, after making room where rows slide.
void Decoder::set_batches(const std::vector<std::int64_t>& lengths, bool rows_are_independent) {
  if (window_) slide(lengths);
  const bool pads = !engine_->host_memory();  // on a device a call per row costs more than padding
  batches_from_lengths(position_, lengths, sizes_.capacity, rows_are_independent, pads, batches_);
}

void Decoder::slide(const std::vector<std::int64_t>& lengths) {
  bool any = false;
  for (std::size_t row = 0; row < position_.size(); ++row) {
    const bool full = lengths[row] > sizes_.capacity - position_[row];
    sliding_[row] = full ? position_[row] : -1;
    any = any || full;
  }
  if (!any) return;
  tensors_.caches().slide(sliding_, *window_);
  for (std::size_t row = 0; row < position_.size(); ++row) {
    position_[row] = sliding_[row] < 0 ? position_[row] : window_->kept(position_[row]);
  }
}

/// Check what the engine wrote, then count the tokens.
void Decoder::finish(const std::vector<std::int64_t>& lengths, bool check_logits) {
  for (const auto& [name, buffer] : tensors_.states()) {
    refuse_non_finite(name, static_cast<const float*>(buffer->read()), buffer->row_bytes() / sizeof(float), lengths);
  }
  if (check_logits || engine_->host_memory()) {
    refuse_non_finite("logits", tensors_.logits(), vocab_, lengths);
  } else {
    logits_checked_ = false;
  }
  refuse_unknown_tokens();
  for (const Batch& batch : batches_) {
    std::copy(tensors_.next_tokens() + batch.start, tensors_.next_tokens() + batch.stop,
              next_tokens_.begin() + batch.start);
  }
  for (std::size_t row = 0; row < position_.size(); ++row) position_[row] += lengths[row];
}

/// values: [batch, width]; the rows of the batches are looked at.
void Decoder::refuse_non_finite(const std::string& name, const float* values, std::size_t width,
                                const std::vector<std::int64_t>& lengths) const {
  std::vector<std::string> problems;
  for (const Batch& batch : batches_) {
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      if (!all_finite(values + static_cast<std::size_t>(row) * width, width)) {
        const auto index = static_cast<std::size_t>(row);
        problems.push_back("row " + std::to_string(row) + " after position " +
                           std::to_string(position_[index] + lengths[index] - 1));
      }
    }
  }
  if (!problems.empty()) refuse_problems(ErrorKind::contract, target_ + ": " + name + " is not finite", problems);
}

void Decoder::refuse_unknown_tokens() const {
  std::vector<std::string> problems;
  for (const Batch& batch : batches_) {
    for (std::int64_t row = batch.start; row < batch.stop; ++row) {
      const std::int64_t token = tensors_.next_tokens()[row];
      if (token < 0 || token >= sizes_.model.vocab) {
        problems.push_back("row " + std::to_string(row) + " has " + std::to_string(token));
      }
    }
  }
  if (!problems.empty()) refuse_problems(ErrorKind::contract, target_ + ": next_token is outside the vocabulary", problems);
}

}  // namespace crt
