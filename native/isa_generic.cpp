#define SPARSEFOLD_ISA generic
#include "matvec.inl.hpp"
// The order matters: cells.inl.hpp ends with the table of this instruction set.
#include "cells.inl.hpp"
