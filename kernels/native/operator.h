// What the operators share: scratch, torch's threads, and a call of the C ABI made of tensors.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "cmm.h"
#include "output_pool.h"

namespace cmm_operator {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Scratch that grows and stays with its thread, so that a call allocates nothing but its output.
inline void* scratch_of(size_t bytes) {
  thread_local struct Scratch {
    void* memory = nullptr;
    size_t size = 0;
    ~Scratch() { free(memory); }
  } scratch;
  if (bytes > scratch.size) {
    free(scratch.memory);
    scratch.size = 0;  // until there is memory: a call that fails must leave nothing that the next one would trust
    const size_t wanted = (bytes + 4095) / 4096 * 4096;
    scratch.memory = aligned_alloc(4096, wanted);
    TORCH_CHECK(scratch.memory, "cmm: out of memory for ", wanted, " bytes of scratch");
    scratch.size = wanted;
  }
  return scratch.memory;
}

inline void run_parallel(int64_t tasks, cmm_task task, void* context) {
  if (tasks == 1) return task(context, 0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(context, i);
  });
}

inline int32_t threads_now() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

// Tokens of x, for tensors without memory too; rows without elements are none.
inline c10::SymInt tokens_of(const Tensor& x) { return x.sym_size(-1) == 0 ? c10::SymInt(0) : x.sym_numel() / x.sym_size(-1); }

inline int32_t dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kBFloat16 ? CMM_BF16 : tensor.scalar_type() == at::kChar ? CMM_I8 : CMM_F32;
}

inline const cmm_kernels* kernels_of(int64_t isa) {
  static const int32_t best = cmm_best_isa();
  const cmm_kernels* kernels = cmm_kernels_of(isa < 0 ? best : (int32_t)std::min<int64_t>(isa, CMM_NUM_ISA));
  TORCH_CHECK_VALUE(kernels, "cmm: this processor or this build has no instruction set ", isa);
  return kernels;
}

inline cmm_layer layer_of(const Tensor& x, const Tensor& w_in, const OptionalTensor& b_in, const Tensor& w_out, int64_t levels,
                          int64_t activation) {
  TORCH_CHECK_VALUE(activation >= 0 && activation < CMM_NUM_ACTIVATIONS, "cmm: activation is ", activation, ", expected a code from 0 to ",
                    CMM_NUM_ACTIVATIONS - 1);
  return {w_in.const_data_ptr(), b_in ? b_in->const_data_ptr() : nullptr, w_out.const_data_ptr(), w_in.size(2), w_in.size(1),
          (int32_t)w_in.size(0), (int32_t)levels, (int32_t)activation, dtype_of(w_in), dtype_of(x), nullptr, nullptr};
}

inline void run_forward(cmm_forward_call call, int64_t isa) {
  const cmm_kernels* kernels = kernels_of(isa);
  call.scratch = scratch_of(kernels->forward_scratch(&call));
  kernels->forward(&call);
}

}  // namespace cmm_operator
