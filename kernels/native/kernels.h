// The function table of one instruction set.
#pragma once
#include "token_walk.h"

namespace CMM_ISA {

constexpr int64_t kTokensPerTask = 8;

template <class X, class W>
struct Kernels {
  static size_t buffers(const cmm_layer& layer) { return (size_t)round_up((int64_t)TokenBuffers<W>::bytes(layer), 64); }

  static void forward(const cmm_forward_call* call) {
    const int64_t tasks = (call->tokens + kTokensPerTask - 1) / kTokensPerTask;
    const int64_t lots = tasks < call->threads ? tasks : call->threads;
    struct Context {
      const cmm_forward_call* call;
      int64_t lots;
    } context{call, lots};
    call->parallel(
        lots,
        [](void* raw, int64_t lot) {
          auto* c = (Context*)raw;
          TokenBuffers<W> memory(c->call->layer, (char*)c->call->scratch + lot * buffers(c->call->layer));
          for (int64_t t = c->call->tokens * lot / c->lots; t < c->call->tokens * (lot + 1) / c->lots; ++t)
            forward_token<X, W>(c->call, t, memory);
        },
        &context);
  }

  static void backward(const cmm_backward_call* call) {
    TokenBuffers<W> memory(call->layer, call->scratch);
    for (int64_t t = 0; t < call->tokens; ++t) backward_token<X, W>(call, t, memory);
  }
};

// Calls f with the element types of the layer.
template <class F>
CMM_INLINE auto with_types(const cmm_layer& layer, F f) {
  if (layer.w_dtype == CMM_F32) return f(Kernels<F32, F32>());
  if (layer.x_dtype == CMM_F32) return f(Kernels<F32, BF16>());
  return f(Kernels<BF16, BF16>());
}

size_t forward_scratch(const cmm_forward_call* call) {
  return with_types(call->layer, [&](auto k) { return call->threads * k.buffers(call->layer); });
}
void forward(const cmm_forward_call* call) {
  with_types(call->layer, [&](auto k) { k.forward(call); });
}
size_t backward_scratch(const cmm_backward_call* call) {
  return with_types(call->layer, [&](auto k) { return k.buffers(call->layer); });
}
void backward(const cmm_backward_call* call) {
  with_types(call->layer, [&](auto k) { k.backward(call); });
}

}  // namespace CMM_ISA
