// Names of files inside a bundle, how a name becomes a file that is safe to open, and a folder and its files that are
// held open: what was hashed is what is read, whoever renames or removes it meanwhile. POSIX only. The twin of
// crt_export/bundle/held.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace crt {

/// A call to the system failed; what() is its reason.
class SystemError : public std::runtime_error {
 public:
  /// The reason is what the system says about the number, unless another is given.
  explicit SystemError(int error_number);
  SystemError(int error_number, const char* reason);
  int number() const noexcept { return number_; }

 private:
  int number_;
};

/// What stat says about a file; if any of it changes, the file must be hashed again.
struct FileState {
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t size = 0;
  std::int64_t modified_ns = 0;
  std::int64_t changed_ns = 0;

  bool operator==(const FileState& other) const noexcept;
  bool operator!=(const FileState& other) const noexcept { return !(*this == other); }
};

/// A regular file that is open for reading.
class RegularFile {
 public:
  /// Follows no link in the last component and does not block on a pipe. Throws SystemError: the file cannot be
  /// opened, is a link (ELOOP), or is not a regular file (EINVAL).
  explicit RegularFile(const std::string& path);
  /// The same below a folder that is held open; name has one component.
  RegularFile(int folder, const std::string& name);
  ~RegularFile();
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;

  int descriptor() const noexcept { return descriptor_; }
  FileState state() const;
  /// Up to count bytes at offset into buffer; fewer only at the end of the file.
  std::size_t read(void* buffer, std::size_t count, std::uint64_t offset) const;

 private:
  int descriptor_;
};

struct HashedFile {
  std::string sha256;
  FileState state;  // of the very file that was hashed
};

/// Why name cannot be a file of a bundle; unset if it can.
std::optional<std::string> name_problem(const std::string& name);
/// Which names, or folders of them, differ in upper and lower case only: one file on macOS and Windows.
std::vector<std::string> collision_problems(const std::vector<std::string>& names);
/// Walk from an open folder to name without following links; what is wrong. name must have passed name_problem.
std::optional<std::string> file_problem(int folder, const std::string& name);
/// Throws SystemError; ESTALE if the file changed while it was read.
HashedFile hash_file(const RegularFile& file);
/// The whole file; unset if it has more than most bytes. Takes no more memory than the file has. Throws SystemError.
std::optional<std::string> read_file(const RegularFile& file, std::size_t most);
/// Absolute, links resolved as far as the path exists; the twin of os.path.realpath.
std::string real_path(const std::string& path);

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
