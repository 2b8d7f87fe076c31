#define SPARSEFOLD_ISA generic
#include "matvec.inl.hpp"
#include "sequence.inl.hpp"
#define SPARSEFOLD_GATED_DOUBLES
#include "gated.inl.hpp"
// The order matters: cells.inl.hpp ends with the table of this instruction set.
#include "cells.inl.hpp"
