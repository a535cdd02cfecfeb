#include "engine/onnxruntime_loading.hpp"

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include <algorithm>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"
#include "engine/memory_map.hpp"

namespace crt {
namespace {

constexpr char kFolderEntry[] = "session.model_external_initializers_file_folder_path";
constexpr std::size_t kPieceBytes = std::size_t{1} << 20U;

/// Between finding a mapping and replacing it nobody may unmap it, as another session that is being loaded would.
std::mutex& loading() {
  static std::mutex mutex;
  return mutex;
}

/// A session; unset where a file was touched meanwhile or its mappings cannot be replaced.
std::optional<Ort::Session> from_mapped(const HeldGraph& graph, const LoadGraph& load, bool keep_mapped) {
  const std::lock_guard<std::mutex> lock(loading());
  std::vector<std::pair<int, std::vector<FileMapping>>> before;
  for (const auto& entry : graph.weights) {
    if (keep_mapped) break;
    std::optional<std::vector<FileMapping>> mapped = mappings_of(entry.second.file->descriptor());
    if (!mapped) return std::nullopt;
    before.emplace_back(entry.second.file->descriptor(), *std::move(mapped));
  }
  std::optional<Ort::Session> session;
  try {
    session = load(graph.model, [&graph](Ort::SessionOptions& options) {
      options.AddConfigEntry(kFolderEntry, graph.folder.c_str());
    });
  } catch (const Ort::Exception&) {  // a fault of the graph shows again; that the folder was renamed meanwhile does not
    return std::nullopt;
  }
  for (const auto& [file, mappings] : before) {
    if (!make_private(file, mappings)) return std::nullopt;
  }
  return graph.unchanged() ? std::move(session) : std::nullopt;
}

/// The content in memory, hashed as it was read; throws Error(bundle) if it is no longer what the manifest says.
std::unique_ptr<char[]> private_copy(const HeldFile& weights) {
  const auto size = static_cast<std::size_t>(weights.state.size);
  std::unique_ptr<char[]> content(new char[std::max<std::size_t>(size, 1)]);
  Sha256 digest;
  for (std::size_t begin = 0; begin < size; begin += kPieceBytes) {
    const std::size_t count = std::min(kPieceBytes, size - begin);
    const std::size_t got = weights.file->read(content.get() + begin, count, begin);
    digest.update(content.get() + begin, got);
    if (got != count) break;
  }
  if (digest.hex() != weights.sha256) {
    throw Error(ErrorKind::bundle,
                weights.path + " was changed while it was loaded; restore the bundle or build it again");
  }
  return content;
}

Ort::Session from_memory(const HeldGraph& graph, const LoadGraph& load) {
  std::vector<std::string> names;
  std::vector<std::unique_ptr<char[]>> contents;
  std::vector<char*> buffers;
  std::vector<std::size_t> sizes;
  for (const auto& [location, weights] : graph.weights) {
    names.push_back(location);
    contents.push_back(private_copy(weights));
    buffers.push_back(contents.back().get());
    sizes.push_back(static_cast<std::size_t>(weights.state.size));
  }
  Ort::Session session = load(graph.model, [&](Ort::SessionOptions& options) {
    options.AddExternalInitializersFromFilesInMemory(names, buffers, sizes);
  });
  contents.clear();
#ifdef __GLIBC__
  ::malloc_trim(0);  // what it keeps of the copies that ONNX Runtime made and freed
#endif
  return session;
}

}  // namespace

Ort::Session load_held_graph(const HeldGraph& graph, const LoadGraph& load, bool keep_mapped) {
  if (graph.weights.empty()) return load(graph.model, [](Ort::SessionOptions&) {});
  if (keep_mapped || replaces_mappings()) {
    if (std::optional<Ort::Session> session = from_mapped(graph, load, keep_mapped)) return *std::move(session);
  }
  try {
    return from_memory(graph, load);
  } catch (const SystemError& error) {
    throw Error(ErrorKind::bundle, "the weights of " + graph.path + " cannot be read (" + error.what() + ")");
  }
}

}  // namespace crt
