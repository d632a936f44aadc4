// CMM kernels for generic; setup.py compiles this file with the flags of that instruction set.
#define CMM_ISA cmm_generic
#define CMM_LANES 4
#include "kernels.h"

extern "C" const cmm_kernels cmm_kernels_generic = {"generic", cmm_generic::forward_scratch, cmm_generic::forward, cmm_generic::backward_scratch,
                                               cmm_generic::backward};
