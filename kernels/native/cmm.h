// C ABI of the CMM kernels: plain pointers and sizes, no allocation, no dependency on torch.
// Shapes: x, y [tokens, hidden]; w_in, w_out [trees, nodes, hidden]; b_in [trees, nodes]; all rows contiguous.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum cmm_dtype { CMM_F32 = 0, CMM_BF16 = 1, CMM_I8 = 2 };
enum cmm_isa { CMM_GENERIC = 0, CMM_AVX2 = 1, CMM_AVX512 = 2, CMM_AVX512_BF16 = 3, CMM_NUM_ISA = 4 };
enum { CMM_NUM_ACTIVATIONS = 6 };

typedef struct cmm_layer {
  const void* w_in;
  const void* b_in;  // may be null
  const void* w_out;
  int64_t hidden, nodes;
  int32_t trees, levels;
  int32_t activation;  // code of fffsweep.kernels.activations
  int32_t w_dtype;     // of w_in, b_in and w_out; with CMM_I8, which has no backward pass, b_in is float32
  int32_t x_dtype;     // of x, y and their gradients
  const float *scale_in, *scale_out;  // [trees, nodes], with CMM_I8: a row of w_in is scale_in times its integers
} cmm_layer;

// Runs task(context, i) for every i in [0, tasks), in any order, on any threads, and returns when all are done.
typedef void (*cmm_task)(void* context, int64_t i);
typedef void (*cmm_parallel)(int64_t tasks, cmm_task task, void* context);

typedef struct cmm_forward_call {
  cmm_layer layer;
  const void* x;
  void* y;
  int64_t tokens;
  float* logits;    // [tokens, trees, levels], or null: kept for the backward pass
  int32_t* leaves;  // [tokens, trees], or null: the last node of each path
  void* scratch;    // cmm_forward_scratch bytes, aligned to 64
  int32_t threads;
  cmm_parallel parallel;
  const float* x_scale;  // null: the kernels for 8-bit weights set it for themselves, when they have rounded x
} cmm_forward_call;

typedef struct cmm_backward_call {
  cmm_layer layer;
  const void* x;
  const void* grad_y;
  const float* logits;
  const int32_t* leaves;
  int64_t tokens;
  void* grad_x;       // x_dtype
  float* grad_w_in;   // written whole: zeros where no token went; null if no gradient of the weights is wanted, then all three are
  float* grad_b_in;   // may be null
  float* grad_w_out;
  void* scratch;      // cmm_backward_scratch bytes, aligned to 64
  int32_t threads;
  cmm_parallel parallel;
} cmm_backward_call;

// Functions of one instruction set.
typedef struct cmm_kernels {
  const char* name;
  size_t (*forward_scratch)(const cmm_forward_call*);
  void (*forward)(const cmm_forward_call*);
  size_t (*backward_scratch)(const cmm_backward_call*);
  void (*backward)(const cmm_backward_call*);
} cmm_kernels;

// Kernels of an instruction set; null where they were not compiled in or this processor cannot run them.
const cmm_kernels* cmm_kernels_of(int32_t isa);
// The best instruction set of this processor.
int32_t cmm_best_isa(void);

#ifdef __cplusplus
}
#endif
