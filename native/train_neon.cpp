#define SPARSEFOLD_ISA neon
#define SPARSEFOLD_NEON
// gated.inl.hpp reads the others, and ends with the table of this instruction set.
#include "gated.inl.hpp"
