#define SPARSEFOLD_ISA avx512
// gated.inl.hpp reads the others, and ends with the table of this instruction set.
#include "gated.inl.hpp"
