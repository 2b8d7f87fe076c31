#define SPARSEFOLD_ISA avx512vnni
#include "matvec.inl.hpp"
// The order matters: cells.inl.hpp ends with the table of this instruction set.
#include "cells.inl.hpp"
