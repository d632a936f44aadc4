// CMM kernels for avx512_bf16; setup.py compiles this file with the flags of that instruction set.
#define CMM_ISA cmm_avx512_bf16
#define CMM_LANES 16
#include "kernels.h"

extern "C" const cmm_kernels cmm_kernels_avx512_bf16 = {"avx512_bf16", cmm_avx512_bf16::forward_scratch, cmm_avx512_bf16::forward, cmm_avx512_bf16::backward_scratch,
                                               cmm_avx512_bf16::backward};
