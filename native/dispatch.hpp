#pragma once
#include <string>
#include <vector>

#include "kernels.hpp"

namespace sparsefold {

/// Instruction sets this processor has, best first. Probed once.
const std::vector<std::string>& available_isas();

/// Whether Intel made this processor.
bool intel();

/// The table of `isa`; "" asks for $SPARSEFOLD_ISA if set, else the best. Throws std::invalid_argument when the
/// processor lacks it or the name is unknown. `chosen`, if given, receives the name.
const Kernels& kernels(const std::string& isa, std::string* chosen = nullptr);

}  // namespace sparsefold
