#include "bundle/manifest.hpp"

#include <cerrno>
#include <memory>
#include <optional>
#include <vector>

#include "bundle/integrity.hpp"
#include "bundle/message_text.hpp"
#include "bundle/paths.hpp"
#include "bundle/problem_list.hpp"
#include "bundle/schema.hpp"
#include "bundle/sha256.hpp"
#include "crt_runtime/error.hpp"

namespace crt {
namespace {

constexpr std::size_t kMaxManifestBytes = std::size_t{64} << 20U;
constexpr char kAgain[] = "the bundle was changed or is incomplete; build it again";

[[noreturn]] void refuse(const std::string& message) { throw Error(ErrorKind::bundle, message); }

std::string read(const HeldFolder& folder, const std::string& path) {
  try {
    const std::shared_ptr<const RegularFile> file = folder.open_file(kManifestName);
    std::optional<std::string> content = read_file(*file, kMaxManifestBytes);
    if (!content) {
      refuse(path + " has " + std::to_string(file->state().size) + " bytes; a manifest has at most " +
             std::to_string(kMaxManifestBytes));
    }
    return *std::move(content);
  } catch (const SystemError& error) {
    if (error.number() == ENOENT) {
      refuse(folder.path() + " is not a bundle: it has no " + kManifestName + "; build one with 'crt-export build'");
    }
    refuse("cannot read " + path + ": " + error.what() + " (expected a regular file, not a link)");
  }
}

JsonValue parse(const std::string& path, const std::string& content) {
  std::optional<JsonValue> manifest;
  try {
    manifest = parse_json(content);
  } catch (const JsonError& error) {
    refuse(path + " " + error.what() + ": " + kAgain);
  }
  if (!manifest->is_object()) refuse(path + " must hold a JSON object, found " + shown(*manifest) + ": " + kAgain);
  return *std::move(manifest);
}

void check_version(const std::string& path, const JsonValue& manifest) {
  const JsonValue* version = manifest.find("schema_version");
  if (version == nullptr || !version->is_integer() || version->integer() < 1) {
    refuse(path + " is not a manifest of " + kToolName + ": expected an integer 'schema_version' of 1 or more, found " +
           (version == nullptr ? "None" : shown(*version)));
  }
  if (version->integer() > kSchemaVersion) {
    refuse(path + " has schema version " + shown(*version) + "; this " + kToolName + " reads up to version " +
           std::to_string(kSchemaVersion) + ": upgrade " + kToolName +
           ", or build the bundle again with this version");
  }
}

}  // namespace

Manifest read_manifest(const HeldFolder& folder) {
  const std::string path = folder.path() + "/" + kManifestName;
  const std::string content = read(folder, path);
  Manifest manifest;
  manifest.content = parse(path, content);
  check_version(path, manifest.content);
  if (const std::optional<std::string> damage = integrity_problem(manifest.content)) {
    refuse(path + " was changed after it was written: " + *damage + "; restore the bundle or build it again");
  }
  const std::vector<std::string> problems = manifest_problems(manifest.content);
  if (!problems.empty()) {
    refuse(problem_list(path + " breaks schema version " + std::to_string(kSchemaVersion), problems));
  }
  manifest.identity = sha256_hex(content.data(), content.size());
  return manifest;
}

}  // namespace crt
