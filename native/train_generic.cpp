#define SPARSEFOLD_ISA generic
#define SPARSEFOLD_GATED_DOUBLES
// gated.inl.hpp reads the others, and ends with the table of this instruction set.
#include "gated.inl.hpp"
