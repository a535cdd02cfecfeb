#include "bundle/integrity.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

#include "bundle/sha256.hpp"
#include "text/messages.hpp"

namespace crt {
namespace {

constexpr char kIntegrity[] = "integrity";
constexpr char kFiles[] = "files";
constexpr char kManifest[] = "manifest";

void append_text(std::string& bytes, std::string_view text) {
  bytes += std::to_string(text.size());
  bytes += ':';
  bytes += text;
}

void append_number(std::string& bytes, double value) {
  std::uint64_t bits = 0;
  static_assert(sizeof bits == sizeof value, "an IEEE 754 double");
  std::memcpy(&bits, &value, sizeof bits);
  bytes += 'd';
  for (int shift = 60; shift >= 0; shift -= 4) bytes += "0123456789abcdef"[bits >> static_cast<unsigned>(shift) & 15U];
}

void append(std::string& bytes, const JsonValue& value);

void append_object(std::string& bytes, const JsonObject& object) {
  std::vector<const JsonMember*> sorted;
  for (const JsonMember& member : object.members()) sorted.push_back(&member);
  std::sort(sorted.begin(), sorted.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
  bytes += 'o';
  for (const JsonMember* member : sorted) {
    append_text(bytes, member->first);
    append(bytes, member->second);
  }
  bytes += 'e';
}

void append(std::string& bytes, const JsonValue& value) {
  if (value.is_null()) {
    bytes += 'n';
  } else if (value.is_boolean()) {
    bytes += value.boolean() ? 't' : 'f';
  } else if (value.is_integer()) {
    bytes += 'i' + std::to_string(value.integer()) + 'e';
  } else if (value.is_number()) {
    append_number(bytes, value.number());
  } else if (value.is_string()) {
    append_text(bytes, value.string());
  } else if (value.is_array()) {
    bytes += 'l';
    for (const JsonValue& item : value.array()) append(bytes, item);
    bytes += 'e';
  } else {
    append_object(bytes, value.object());
  }
}

std::string digest_of(const std::string& bytes) { return sha256_hex(bytes.data(), bytes.size()); }

std::string files_digest(const JsonValue& manifest) {
  const JsonValue* files = manifest.find(kFiles);
  return digest_of(files == nullptr ? "n" : canonical(*files));
}

/// Digest of everything but the table of files and the digest itself; files: the value of integrity.files.
std::string digest_of_rest(const JsonValue& manifest, const JsonValue& files) {
  std::vector<const JsonMember*> rest;
  for (const JsonMember& member : manifest.object().members()) {
    if (member.first != kIntegrity && member.first != kFiles) rest.push_back(&member);
  }
  std::string digests = "o";
  append_text(digests, kFiles);
  append(digests, files);
  digests += 'e';
  std::sort(rest.begin(), rest.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
  std::string bytes = "o";
  bool written = false;
  const auto write_digests = [&] {
    append_text(bytes, kIntegrity);
    bytes += digests;
    written = true;
  };
  for (const JsonMember* member : rest) {
    if (!written && member->first > kIntegrity) write_digests();
    append_text(bytes, member->first);
    append(bytes, member->second);
  }
  if (!written) write_digests();
  return digest_of(bytes + 'e');
}

bool is_text(const JsonValue* value, const std::string& text) {
  return value != nullptr && value->is_string() && value->string() == text;
}

}  // namespace

std::string canonical(const JsonValue& value) {
  std::string bytes;
  append(bytes, value);
  return bytes;
}

ManifestDigests manifest_digests(const JsonValue& manifest) {
  ManifestDigests digests;
  digests.files = files_digest(manifest);
  digests.manifest = digest_of_rest(manifest, JsonValue(digests.files));
  return digests;
}

std::optional<std::string> integrity_problem(const JsonValue& manifest) {
  const JsonValue* found = manifest.find(kIntegrity);
  const bool whole = found != nullptr && found->is_object() && found->object().members().size() == 2 &&
                     found->find(kManifest) != nullptr && found->find(kFiles) != nullptr;
  if (!whole) {
    return "expected an object 'integrity' with the digests 'manifest' and 'files', found " +
           (found == nullptr ? "nothing" : shown(*found));
  }
  const std::string digest = digest_of_rest(manifest, found->at(kFiles));
  if (!is_text(found->find(kManifest), digest)) {
    return "its content has the digest " + digest + ", integrity.manifest says " + shown(found->at(kManifest));
  }
  return std::nullopt;
}

bool files_are_as_written(const JsonValue& manifest) {
  return is_text(manifest.at(kIntegrity).find(kFiles), files_digest(manifest));
}

}  // namespace crt
