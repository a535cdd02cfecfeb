// A loaded graph against the contract that the bundle's manifest gives for it.
#pragma once

#include <string>
#include <vector>

#include "bundle/bundle_files.hpp"
#include "engine/engine.hpp"

namespace crt {

/// What differs between a loaded graph and its contract, with the target's cache dtype and head size; empty if nothing.
std::vector<std::string> contract_problems(const BundleFiles& files, const Target& target, const std::string& graph,
                                           const Program& program);

/// Throws Error(contract) with all problems, unless there is none.
void refuse_broken_contract(const Target& target, const std::vector<std::string>& problems);

}  // namespace crt
