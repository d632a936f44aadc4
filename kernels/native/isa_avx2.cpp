// CMM kernels for avx2; setup.py compiles this file with the flags of that instruction set.
#define CMM_ISA cmm_avx2
#define CMM_LANES 8
#include "kernels.h"

extern "C" const cmm_kernels cmm_kernels_avx2 = {"avx2", cmm_avx2::forward_scratch, cmm_avx2::forward, cmm_avx2::backward_scratch,
                                               cmm_avx2::backward};
