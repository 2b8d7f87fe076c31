#define SPARSEFOLD_ISA avx512vnni
#include "matvec.inl.hpp"
#define SPARSEFOLD_SEQUENCES_ELSEWHERE  // training multiplies no codes: those of avx512 are as fast
// The order matters: cells.inl.hpp ends with the table of this instruction set.
#include "cells.inl.hpp"
