// What a runtime must offer so that a session can run on it: the C++ twin of crt_export/engine/base.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace crt {

enum class DType { int64, float32, float16 };
std::size_t size_of(DType dtype) noexcept;
/// "int64", "float32" or "float16".
const char* name_of(DType dtype) noexcept;

using Shape = std::vector<std::int64_t>;
/// [rows, seq, *shape].
Shape shape_of_tokens(std::int64_t rows, std::int64_t seq, const Shape& shape);

/// One input or output of a loaded graph; a dim of -1 is dynamic.
struct TensorSpec {
  std::string name;
  DType dtype = DType::float32;
  Shape dims;
};

/// Memory of one tensor [rows, ...] where the runtime computes; each row is contiguous.
class Buffer {
 public:
  virtual ~Buffer() = default;
  const Shape& shape() const noexcept { return shape_; }
  DType dtype() const noexcept { return dtype_; }
  std::size_t bytes() const noexcept { return bytes_; }
  std::size_t row_bytes() const noexcept { return shape_[0] == 0 ? 0 : bytes_ / static_cast<std::size_t>(shape_[0]); }
  /// Address of the first element where the runtime computes, constant for the buffer's life.
  virtual void* address() noexcept = 0;
  /// The content on the host; may be the memory itself, valid until the next call on this buffer. Allocates nothing
  /// after its first call.
  virtual const void* read() = 0;
  /// Replace the whole content with bytes() bytes.
  virtual void write(const void* values) = 0;
  /// Take rows begin to end from a buffer of the same shape and dtype.
  virtual void copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) = 0;
  /// Zero [row, :, begin:end] of a cache [batch, heads, capacity, head_dim].
  virtual void clear(std::int64_t row, std::int64_t begin, std::int64_t end) = 0;

 protected:
  Buffer(Shape shape, DType dtype);

 private:
  Shape shape_;
  DType dtype_;
  std::size_t bytes_;
};

/// Rows start to stop of a buffer, bound as one tensor.
struct BufferSlice {
  Buffer* buffer = nullptr;
  std::int64_t start = 0;
  std::int64_t stop = 0;

  Shape shape() const;
  void* address() const;
  std::size_t bytes() const { return buffer->row_bytes() * static_cast<std::size_t>(stop - start); }
};

using Binding = std::map<std::string, BufferSlice>;

/// A graph bound to its tensors.
class Launch {
 public:
  virtual ~Launch() = default;
  /// Run once and wait for the result; throws Error(contract) if the runtime refused or failed. Allocates
  /// nothing of its own.
  virtual void run() = 0;
};

/// A graph that a runtime has loaded.
class Program {
 public:
  virtual ~Program() = default;
  virtual const std::vector<TensorSpec>& inputs() const noexcept = 0;
  virtual const std::vector<TensorSpec>& outputs() const noexcept = 0;
  /// Fix the memory of every input and output; the buffers must outlive the launch. An output at its input's address is
  /// updated in place. repeated: the launch runs many times, so preparing it (a CUDA graph) pays.
  virtual std::unique_ptr<Launch> bind(const Binding& inputs, const Binding& outputs, bool repeated) = 0;
};

/// The graphs of one target, loaded once and shared by the sessions that run them; safe to use from several threads.
class Engine {
 public:
  virtual ~Engine() = default;
  /// Longest chunk of one prefill call.
  virtual std::int64_t max_tokens() const noexcept = 0;
  /// Most rows of one call; unset where any number runs.
  virtual std::optional<std::int64_t> max_batch() const noexcept = 0;
  /// The only cache capacity it runs with; unset where any capacity runs.
  virtual std::optional<std::int64_t> fixed_capacity() const noexcept = 0;
  /// Whether it computes in host memory, so that reading a buffer costs nothing.
  virtual bool host_memory() const noexcept = 0;
  /// Whether one graph of a single pass serves everything: "step" then is that graph too, bound to chunks of one token,
  /// and an iterated model has "prefill_pass" and no unrolled "prefill"; any other has "prefill", which is one pass
  /// anyway.
  virtual bool one_graph() const noexcept { return false; }
  /// The loaded graph "step", "prefill" or "prefill_pass" (loaded on first use, unless one_graph()); throws
  /// Error(unsupported) if the target has none.
  virtual Program& program(const std::string& graph) = 0;
  /// New zeroed memory where this engine computes.
  virtual std::unique_ptr<Buffer> allocate(Shape shape, DType dtype) = 0;
};

/// Zeroed host memory that a CPU runtime reads and writes directly.
class HostBuffer final : public Buffer {
 public:
  /// Throws std::bad_alloc if there is not enough memory.
  HostBuffer(Shape shape, DType dtype);

  void* address() noexcept override { return values_; }
  const void* read() override { return values_; }
  void write(const void* values) override;
  void copy_rows(Buffer& source, std::int64_t begin, std::int64_t end) override;
  void clear(std::int64_t row, std::int64_t begin, std::int64_t end) override;

 private:
  struct Release {
    void operator()(void* memory) const noexcept { std::free(memory); }
  };
  std::unique_ptr<void, Release> memory_;
  unsigned char* values_;
};

}  // namespace crt
