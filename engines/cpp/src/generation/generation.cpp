// The loop around a session; the C++ twin of crt_export/runtime/generate.py, which has the rules.
#include "crt_runtime/generation.hpp"

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "crt_runtime/config.hpp"
#include "crt_runtime/error.hpp"
#include "crt_runtime/session.hpp"
#include "crt_runtime/tokenizer.hpp"
#include "generation/row_text.hpp"
#include "session/history.hpp"
#include "session/rows.hpp"
#include "text/messages.hpp"
#include "text/utf8.hpp"

namespace crt {
namespace {

using TokenRows = std::vector<std::vector<std::int64_t>>;

// Rows that may grow without end (a sliding session) do not get all of it in advance.
constexpr std::int64_t kMostReserved = 65536;

/// The decoder of new text; none where the model's tokenizer is not in this library and text is not asked for.
std::optional<TextStream> decoder_for(const ModelConfig& config, bool needed) {
  if (config.tokenizer == "byte") return ByteTokenizer(config).stream();
  if (!needed) return std::nullopt;
  if (config.tokenizer == "none") {
    throw Error(ErrorKind::input,
                "stop strings need text, and this model has no tokenizer (config.json: tokenizer = none); give the "
                "ids of stop_tokens instead");
  }
  throw Error(ErrorKind::unsupported, "stop strings need text, and this library does not read the model's " +
                                          config.tokenizer + "; give the ids of stop_tokens instead");
}

}  // namespace

/// One row of the generation.
struct GenerationRow {
  RowText text;
  std::vector<std::int64_t> tokens;
  StopReason reason = StopReason::running;
  std::size_t prompt_tokens = 0;

  bool running() const noexcept { return reason == StopReason::running; }
  /// A stop string may turn up in the rest of the text that the row's end let out.
  void stop(StopReason why) noexcept { reason = text.stopped() ? StopReason::stop_string : why; }
};

struct Generation::State {
  State(Session& session, TokenRows prompts, GenerationOptions options, TokenCallback callback);

  bool next(std::int64_t* tokens);
  const GenerationRow& row(std::size_t index) const;

 private:
  void check_prompts();
  void check_stop_tokens() const;
  /// Feed what is pending, and the prompts at first.
  void run();
  void run_prompts();
  void step();
  /// Once the prompts are fed: what the rows hold now is what their new text goes on from.
  void begin_texts();
  /// Into drawn_; before anything is changed, for a choice may fail.
  void draw();
  /// Make a drawn token part of its row, or end the row; the token if it is given out.
  std::int64_t take(std::size_t index, std::int64_t token);
  /// take() for every row that has drawn; whether anything is given out. All of it, or the session is poisoned.
  bool take_all();
  void report(const std::vector<std::int64_t>& given);

  Session& session_;
  History& history_;
  GenerationOptions options_;
  TokenCallback callback_;
  std::vector<std::int64_t> stops_;
  TokenRows prompts_;
  bool started_ = false;
  bool torn_ = false;  // history, tokens and texts went on unlike
  bool texts_begun_ = false;
  // The engine's argmax is the same choice, and saves the way of the logits to the host.
  bool argmax_;
  std::vector<GenerationRow> rows_;
  std::vector<std::int64_t> fed_;    // [batch], kNoToken for none
  std::vector<std::int64_t> drawn_;  // [batch], then what of it is given out; kNoToken for none
  std::optional<Sampler> sampler_;
  const float* logits_ = nullptr;  // [batch, vocab] of the last run, unless argmax_
};

Generation::State::State(Session& session, TokenRows prompts, GenerationOptions options, TokenCallback callback)
    : session_(session),
      history_(session.history()),
      options_(std::move(options)),
      callback_(std::move(callback)),
      stops_(options_.stop_tokens),
      prompts_(std::move(prompts)),
      argmax_(options_.sampling.greedy() && options_.sampling.repetition_penalty == 1.0),
      fed_(static_cast<std::size_t>(session.batch()), kNoToken),
      drawn_(static_cast<std::size_t>(session.batch()), kNoToken) {
  options_.check();
  session.require_usable(options_.passes);
  if (prompts_.empty()) prompts_.resize(fed_.size());
  check_prompts();
  check_stop_tokens();
  const auto& ends = session.eos_token_ids();
  if (!options_.ignore_eos) stops_.insert(stops_.end(), ends.begin(), ends.end());
  if (!argmax_) sampler_.emplace(static_cast<std::size_t>(session.vocab_size()));
  const auto decoder = decoder_for(session.config(), !options_.stop_strings.empty());
  const auto reserved = static_cast<std::size_t>(std::min(options_.max_new_tokens, kMostReserved));
  rows_.reserve(prompts_.size());
  for (const auto& prompt : prompts_) {
    rows_.push_back({RowText(decoder, options_.stop_strings, reserved), {}, StopReason::running, prompt.size()});
    rows_.back().tokens.reserve(reserved);
  }
}

void Generation::State::check_prompts() {
  check_token_rows(prompts_, session_.batch(), session_.vocab_size());
  std::vector<std::string> empty;
  std::vector<std::string> full;
  for (std::size_t index = 0; index < prompts_.size(); ++index) {
    const std::string where = "row " + std::to_string(index) + ": ";
    const std::int64_t held = session_.position()[index];
    if (prompts_[index].empty() && held == 0) {
      empty.push_back(where + "empty prompt, and the row holds no tokens to go on from");
    }
    const bool waits = history_.pending()[index] != kNoToken;
    const auto fed = static_cast<std::int64_t>(prompts_[index].size()) + (waits ? 1 : 0);
    if (!session_.slides() && options_.max_new_tokens > session_.capacity() - held - fed) {
      // Unsigned, because max_new_tokens may be as large as an int64 can be.
      const auto wanted = static_cast<std::uint64_t>(options_.max_new_tokens) + static_cast<std::uint64_t>(fed);
      full.push_back(where + std::to_string(held) + " tokens in the cache and " + std::to_string(wanted) +
                     " more exceed the capacity of " + std::to_string(session_.capacity()));
    }
  }
  refuse_problems(ErrorKind::input, "generate needs something to continue in every row", empty);
  refuse_problems(ErrorKind::input, "prompt and new tokens exceed the capacity", full);
}

/// One that the model cannot choose would stop nothing, and nobody would hear of it.
void Generation::State::check_stop_tokens() const {
  std::vector<std::string> problems;
  for (const std::int64_t token : options_.stop_tokens) {
    if (token < session_.vocab_size()) continue;
    problems.push_back("token id " + std::to_string(token) + " is outside the vocabulary (0 to " +
                       std::to_string(session_.vocab_size() - 1) + ")");
  }
  refuse_problems(ErrorKind::input, "stop tokens", problems);
}

const GenerationRow& Generation::State::row(std::size_t index) const {
  if (index < rows_.size()) return rows_[index];
  throw Error(ErrorKind::input,
              "row " + std::to_string(index) + " is outside the batch (0 to " + std::to_string(rows_.size() - 1) + ")");
}

bool Generation::State::next(std::int64_t* tokens) {
  const auto running = [](const GenerationRow& row) { return row.running(); };
  if (std::none_of(rows_.begin(), rows_.end(), running)) {
    std::fill_n(tokens, rows_.size(), kNoToken);
    return false;
  }
  if (torn_) {
    throw Error(ErrorKind::input,
                "this generation failed in the middle of a token and cannot go on; call reset() or restore() of its "
                "session and start another");
  }
  run();
  draw();
  begin_texts();
  const bool anything = take_all();
  report(drawn_);
  std::copy(drawn_.begin(), drawn_.end(), tokens);  // at the end: a call that fails leaves its outputs alone
  return anything;
}

void Generation::State::run() {
  for (std::size_t index = 0; index < rows_.size(); ++index) {
    fed_[index] = rows_[index].running() ? history_.pending()[index] : kNoToken;
  }
  if (started_) return step();
  run_prompts();
  started_ = true;
  prompts_ = TokenRows();
}

void Generation::State::run_prompts() {
  TokenRows rows = prompts_;
  std::size_t longest = 0;
  for (std::size_t index = 0; index < rows.size(); ++index) {
    if (fed_[index] != kNoToken) rows[index].insert(rows[index].begin(), fed_[index]);
    longest = std::max(longest, rows[index].size());
  }
  if (longest > 1) {
    PrefillOptions prefill;
    prefill.passes = options_.passes;
    logits_ = session_.prefill(rows, prefill);
    return;
  }
  // A step, so that going on gives what an unbroken generation gives, to the last bit.
  const auto only_token = [](const std::vector<std::int64_t>& row) { return row.empty() ? kNoToken : row.front(); };
  std::transform(rows.begin(), rows.end(), fed_.begin(), only_token);
  step();
}

void Generation::State::begin_texts() {
  if (texts_begun_) return;
  for (std::size_t index = 0; index < rows_.size(); ++index) {
    rows_[index].text.go_on(history_.recent(static_cast<std::int64_t>(index)), kRecentTokens, history_.held()[index]);
  }
  texts_begun_ = true;
}

void Generation::State::step() {
  const bool feeds = std::any_of(fed_.begin(), fed_.end(), [](std::int64_t token) { return token != kNoToken; });
  if (argmax_) {
    if (feeds) session_.advance(fed_.data(), fed_.size());
  } else {
    logits_ = feeds ? session_.step(fed_.data(), fed_.size()) : session_.logits();
  }
}

void Generation::State::draw() {
  const std::int64_t* found = argmax_ ? session_.next_tokens() : nullptr;
  const auto vocab = static_cast<std::size_t>(session_.vocab_size());
  for (std::size_t index = 0; index < rows_.size(); ++index) {
    drawn_[index] = kNoToken;
    if (!rows_[index].running()) continue;
    if (argmax_) {
      drawn_[index] = found[index];
      if (found[index] != kNoToken) continue;
      throw Error(ErrorKind::input, "row " + std::to_string(index) +
                                        " holds no token: its session was reset while a generation was being read");
    }
    drawn_[index] = sampler_->sample(logits_ + index * vocab, history_.seen(static_cast<std::int64_t>(index)),
                                     options_.sampling, static_cast<std::uint32_t>(index),
                                     static_cast<std::uint64_t>(history_.drawn()[index]));
  }
}

bool Generation::State::take_all() {
  bool anything = false;
  torn_ = true;
  try {
    for (std::size_t index = 0; index < rows_.size(); ++index) {
      rows_[index].text.begin_step();
      if (drawn_[index] != kNoToken) drawn_[index] = take(index, drawn_[index]);
      anything = anything || drawn_[index] != kNoToken || !rows_[index].text.piece().empty();
    }
  } catch (...) {
    session_.fail("a generation failed in the middle of a token");
    throw;
  }
  torn_ = false;
  return anything;
}

std::int64_t Generation::State::take(std::size_t index, std::int64_t token) {
  GenerationRow& row = rows_[index];
  const bool keep = std::find(stops_.begin(), stops_.end(), token) == stops_.end();
  history_.draw(static_cast<std::int64_t>(index), token, keep);
  if (!keep) {
    row.text.finish();
    row.stop(StopReason::stop_token);
    return kNoToken;
  }
  row.tokens.push_back(token);
  row.text.push(token);
  history_.hold(static_cast<std::int64_t>(index), row.text.held());
  if (row.text.stopped()) {
    row.stop(StopReason::stop_string);
  } else if (static_cast<std::int64_t>(row.tokens.size()) >= options_.max_new_tokens) {
    row.stop(StopReason::max_new_tokens);
  }
  return token;
}

void Generation::State::report(const std::vector<std::int64_t>& given) {
  if (!callback_) return;
  for (std::size_t index = 0; index < rows_.size(); ++index) {
    GenerationRow& row = rows_[index];
    if (given[index] == kNoToken && row.text.piece().empty()) continue;
    const bool goes_on = callback_(static_cast<std::int64_t>(index), given[index], row.text.piece());
    if (!goes_on && row.running()) row.reason = StopReason::callback;
  }
}

Generation::Generation(Session& session, TokenRows prompts, GenerationOptions options, TokenCallback callback)
    : state_(std::make_unique<State>(session, std::move(prompts), std::move(options), std::move(callback))) {}
Generation::~Generation() = default;
Generation::Generation(Generation&&) noexcept = default;
Generation& Generation::operator=(Generation&&) noexcept = default;

bool Generation::next(std::int64_t* tokens) { return state_->next(tokens); }
const std::vector<std::int64_t>& Generation::tokens(std::size_t row) const { return state_->row(row).tokens; }
const std::string& Generation::text(std::size_t row) const { return state_->row(row).text.text(); }
const std::string& Generation::piece(std::size_t row) const { return state_->row(row).text.piece(); }
std::string Generation::rest(std::size_t row) const { return state_->row(row).text.rest(); }
std::size_t Generation::prompt_tokens(std::size_t row) const { return state_->row(row).prompt_tokens; }
StopReason Generation::stop_reason(std::size_t row) const { return state_->row(row).reason; }

Generation Session::generate(TokenRows prompts, GenerationOptions options, TokenCallback callback) {
  return Generation(*this, std::move(prompts), std::move(options), std::move(callback));
}

const char* stop_reason_name(StopReason reason) noexcept {
  switch (reason) {
    case StopReason::running: return "running";
    case StopReason::max_new_tokens: return "max_new_tokens";
    case StopReason::stop_token: return "stop_token";
    case StopReason::stop_string: return "stop_string";
    case StopReason::callback: return "callback";
  }
  return "unknown";
}

void GenerationOptions::check() const {
  std::vector<std::string> problems;
  if (max_new_tokens < 1) {
    problems.push_back("max_new_tokens must be at least 1, found " + std::to_string(max_new_tokens));
  }
  for (const std::int64_t token : stop_tokens) {
    if (token < 0) problems.push_back("stop token id " + std::to_string(token) + " must be at least 0");
  }
  for (const std::string& stop : stop_strings) {
    if (stop.empty()) problems.push_back("stop string '' must be a string of at least one character");
    const std::size_t invalid = first_invalid_utf8(stop);
    if (invalid != std::string::npos) {
      problems.push_back("stop string " + std::to_string(&stop - stop_strings.data()) +
                         " is not valid UTF-8 at byte " + std::to_string(invalid));
    }
  }
  if (passes < kAdaptive) {
    problems.push_back("passes must be at least 1, 0 (the target's own choice), -1 (exact) or -2 (adaptive), found " +
                       std::to_string(passes));
  }
  sampling.check();
  refuse_problems(ErrorKind::input, "generation options", problems);
}

}  // namespace crt
