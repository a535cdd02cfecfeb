// The C++ twin of crt_export/runtime/bundle.py.
#include "crt_runtime/bundle.hpp"

#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>

#include "bundle/bundle_files.hpp"
#include "bundle/target.hpp"
#include "crt_runtime/error.hpp"
#include "engine/back_ends.hpp"
#include "session/decoder.hpp"
#include "session/session_impl.hpp"
#include "session/slide.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

void check_number(const char* name, std::int64_t value, std::int64_t least,
                  std::optional<std::int64_t> most = std::nullopt) {
  if (value < least || (most && value > *most)) {
    const std::string upper = most ? " and at most " + std::to_string(*most) : "";
    throw Error(ErrorKind::input, std::string(name) + " must be at least " + std::to_string(least) + upper +
                                      ", found " + std::to_string(value));
  }
}

std::int64_t chosen_capacity(const SessionOptions& options, const Target& target) {
  const std::int64_t capacity = options.capacity.value_or(target.capacity);
  if (capacity < 1 || capacity > target.capacity) {
    throw Error(ErrorKind::input, "capacity must be at least 1 and at most " + std::to_string(target.capacity) +
                                      " (what " + target.name +
                                      " was built for; a build with a larger --capacity has more room), found " +
                                      std::to_string(capacity));
  }
  return capacity;
}

/// Whether rows slide; throws Error(input) if they cannot.
bool chosen_slide(const SessionOptions& options, const ModelConfig& config, std::int64_t capacity, DType cache_dtype) {
  if (options.on_full == OnFull::error) return false;
  if (!config.window()) {
    throw Error(ErrorKind::input,
                "on_full evict needs a model with an attention window; this one's tokens see all earlier ones, or know "
                "where they stand (its config has no sliding_window, or learned positions): use on_full error");
  }
  const std::int64_t window = *config.window();
  const std::int64_t least = Window::least_capacity(window, cache_dtype);
  if (capacity < least) {
    throw Error(ErrorKind::input,
                "on_full evict needs a capacity of at least " + std::to_string(least) + ", the attention window of " +
                    std::to_string(window) +
                    (least > window ? " and an eighth more, since keys are rounded to float16 at every slide" : "") +
                    "; found " + std::to_string(capacity));
  }
  return true;
}

void check_limits(const Target& target, const Engine& engine, std::int64_t batch, std::int64_t capacity) {
  if (engine.fixed_capacity() && capacity != *engine.fixed_capacity()) {
    throw Error(ErrorKind::input, target.name + " was compiled for a capacity of " +
                                      std::to_string(*engine.fixed_capacity()) + ", found " +
                                      std::to_string(capacity));
  }
  if (engine.max_batch() && batch > *engine.max_batch()) {
    throw Error(ErrorKind::input, target.name + " was compiled for a batch of at most " +
                                      std::to_string(*engine.max_batch()) + ", found " + std::to_string(batch));
  }
}

}  // namespace

class Bundle::Impl {
 public:
  explicit Impl(BundleFiles files) : files_(std::move(files)) {}

  const BundleFiles& files() const noexcept { return files_; }
  std::unique_ptr<Session::Impl> session(const std::string& name, const SessionOptions& options);

 private:
  std::shared_ptr<Engine> engine(const Target& target, int threads);

  BundleFiles files_;
  std::mutex mutex_;
  std::map<std::pair<std::string, int>, std::shared_ptr<Engine>> engines_;
};

std::unique_ptr<Session::Impl> Bundle::Impl::session(const std::string& name, const SessionOptions& options) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const Target& target = files_.target(name);
  const ModelConfig& config = files_.config();
  check_number("batch", options.batch, 1);
  const int threads = options.threads.value_or(target.threads);
  check_number("threads", threads, 0, kMostThreads);
  const std::int64_t capacity = chosen_capacity(options, target);
  const bool slides = chosen_slide(options, config, capacity, target.cache_dtype);
  std::shared_ptr<Engine> shared = engine(target, threads);
  check_limits(target, *shared, options.batch, capacity);
  const std::int64_t unroll = config.iterated ? target.unroll.value_or(0) : 0;
  SessionSetup setup{name, files_.identity(), {options.batch, capacity, config, target.cache_dtype, unroll}, slides,
                     target.rows_are_independent(), target.prefill};
  try {
    return std::make_unique<Session::Impl>(std::move(shared), std::move(setup));
  } catch (const std::bad_alloc&) {
    throw Error(ErrorKind::input, "batch " + std::to_string(options.batch) + " x capacity " + std::to_string(capacity) +
                                      " needs more memory than there is; open the session with a smaller batch or "
                                      "capacity");
  } catch (const std::length_error&) {  // a vector's word for far too much
    throw Error(ErrorKind::input, "batch " + std::to_string(options.batch) +
                                      " is more than memory can address; open the session with a smaller batch");
  }
}

std::shared_ptr<Engine> Bundle::Impl::engine(const Target& target, int threads) {
  std::shared_ptr<Engine>& engine = engines_[{target.name, threads}];
  if (engine == nullptr) engine = open_engine(files_, target, threads);
  return engine;
}

Bundle::Bundle(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
Bundle::~Bundle() = default;
Bundle::Bundle(Bundle&&) noexcept = default;
Bundle& Bundle::operator=(Bundle&&) noexcept = default;

Bundle Bundle::load(const std::string& path, bool allow_unvalidated, const std::string& identity) {
  return Bundle(std::make_shared<Impl>(BundleFiles::open(path, allow_unvalidated, identity)));
}

const std::string& Bundle::path() const noexcept { return impl_->files().path(); }
const std::string& Bundle::identity() const noexcept { return impl_->files().identity(); }
const ModelConfig& Bundle::config() const noexcept { return impl_->files().config(); }
const std::vector<std::string>& Bundle::targets() const noexcept { return impl_->files().target_names(); }

std::string Bundle::default_target() const {
  for (const char* device : {"cpu", "cuda"}) {
    for (const std::string& name : targets()) {
      const Target& target = impl_->files().target(name);
      if (target.device == device && runs_here(target)) return name;
    }
  }
  throw Error(ErrorKind::unsupported, path() + " has no target that this library runs, only " +
                                          (targets().empty() ? "none at all" : joined(targets())) +
                                          "; build it with --target ort-cpu-fp32");
}

ByteTokenizer Bundle::tokenizer() const { return ByteTokenizer(config()); }

Session Bundle::session(const std::string& target, const SessionOptions& options) {
  return Session(impl_->session(target, options));
}

}  // namespace crt
