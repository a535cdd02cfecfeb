// A folder and its files that are held open: what was hashed is what is read, whoever renames or removes it meanwhile.
// The twin of crt_export/bundle/held.py and held_graph.py. POSIX only.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "bundle/paths.hpp"

namespace crt {

/// A folder that is held open; path is where it was found.
class HeldFolder {
 public:
  /// Throws SystemError: it cannot be opened or is no folder.
  explicit HeldFolder(std::string path);
  ~HeldFolder();
  HeldFolder(const HeldFolder&) = delete;
  HeldFolder& operator=(const HeldFolder&) = delete;

  const std::string& path() const noexcept { return path_; }
  /// Whether path leads to another folder by now, or nowhere.
  bool exchanged() const;
  /// Why name, a valid one, is no regular file reached through no link; unset if it is.
  std::optional<std::string> problem(const std::string& name) const;
  /// A regular file, through no link. Throws SystemError.
  std::shared_ptr<const RegularFile> open_file(const std::string& name) const;
  /// A path by which this process reaches this very folder; on Linux whatever its name is by now.
  std::string entry_path() const;
  /// Every file below it, and what is neither a file nor a folder as a problem. Throws SystemError.
  std::vector<std::string> files(std::vector<std::string>& problems) const;

 private:
  std::string path_;
  int descriptor_;
};

/// A file whose content was compared with the manifest.
struct HeldFile {
  std::string path;  // what messages call it
  std::shared_ptr<const RegularFile> file;
  FileState state;  // while it was hashed
  std::string sha256;

  /// Whether it is as it was hashed; a rename or a removal, which leave the content, count as changes.
  bool unchanged() const { return file->state() == state; }
};

/// A checked graph as a runtime may load it.
struct HeldGraph {
  std::string path;    // what messages call it
  std::string model;   // content, the very bytes that were hashed and searched
  std::string folder;  // where the locations of its weights are looked up: leads to the held folder, not to its name
  std::map<std::string, HeldFile> weights;  // location in the graph -> file

  bool unchanged() const;
};

}  // namespace crt
