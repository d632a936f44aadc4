// Chooses the kernels of an instruction set at run time. CMM_X86 is defined where setup.py compiled the x86 ones.
#include "cmm.h"

extern "C" {

extern const cmm_kernels cmm_kernels_generic;
#ifdef CMM_X86
extern const cmm_kernels cmm_kernels_avx2, cmm_kernels_avx512, cmm_kernels_avx512_bf16;
#endif

const cmm_kernels* cmm_kernels_of(int32_t isa) {
  switch (isa) {
    case CMM_GENERIC:
      return &cmm_kernels_generic;
#ifdef CMM_X86
    case CMM_AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &cmm_kernels_avx2 : nullptr;
    case CMM_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                     __builtin_cpu_supports("avx512dq")
                 ? &cmm_kernels_avx512
                 : nullptr;
    case CMM_AVX512_BF16:
      // every processor with the first has the second: integer products for 8-bit weights
      return cmm_kernels_of(CMM_AVX512) && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")
                 ? &cmm_kernels_avx512_bf16
                 : nullptr;
#endif
    default:
      return nullptr;
  }
}

int32_t cmm_best_isa(void) {
  for (int32_t isa = CMM_NUM_ISA - 1; isa > 0; --isa)
    if (cmm_kernels_of(isa)) return isa;
  return CMM_GENERIC;
}
}
