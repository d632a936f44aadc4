// CMM kernels for avx512; setup.py compiles this file with the flags of that instruction set.
#define CMM_ISA cmm_avx512
#define CMM_LANES 16
#include "kernels.h"

extern "C" const cmm_kernels cmm_kernels_avx512 = {"avx512", cmm_avx512::forward_scratch, cmm_avx512::forward, cmm_avx512::backward_scratch,
                                               cmm_avx512::backward};
