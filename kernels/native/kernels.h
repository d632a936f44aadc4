// The function table of one instruction set: which walk takes a call, and how it is shared between threads.
#pragma once
#include "batch_backward.h"
#include "batch_walk.h"
#include "token_walk.h"

namespace CMM_ISA {

constexpr int64_t kFewTokens = 2;         // below this a token walks alone
constexpr int64_t kPassTokens = 1 << 16;  // of one pass, which bounds its memory

// X, Y and W: element types of tokens, outputs and weights.
template <class X, class Y, class W>
struct Kernels {
  typedef typename Y::type Element;

  static size_t token_bytes(const cmm_layer& layer) { return (size_t)round_up((int64_t)TokenBuffers<W>::bytes(layer), 64); }

  // A layer of several trees goes through all of them chunk by chunk, one thread a chunk: its tokens and sums stay in the cache.
  static int64_t chunk_tokens(const cmm_forward_call* call) {
    const int64_t share = (call->tokens + call->threads - 1) / call->threads;
    return share < kChunk ? share : kChunk;
  }
  static size_t chunk_bytes(const cmm_forward_call* call) {
    const int64_t tokens = chunk_tokens(call);
    return (size_t)round_up(tokens * call->layer.hidden * 4, 64) + PassMemory::bytes(tokens, call->layer.levels);
  }

  static size_t forward_scratch(const cmm_forward_call* call) {
    if (call->tokens < kFewTokens) return token_bytes(call->layer);
    if (call->layer.trees > 1) return chunk_bytes(call) * call->threads;
    return PassMemory::bytes(call->tokens < kPassTokens ? call->tokens : kPassTokens, call->layer.levels);
  }

  static void forward(const cmm_forward_call* call) {
    if (call->tokens < kFewTokens) {
      TokenBuffers<W> memory(call->layer, call->scratch);
      for (int64_t t = 0; t < call->tokens; ++t) forward_token<X, Y, W>(call, t, memory);
    } else if (call->layer.trees == 1) {
      one_tree(call);
    } else {
      call->parallel(call->threads, [](void* raw, int64_t lot) { several_trees((const cmm_forward_call*)raw, lot); }, (void*)call);
    }
  }

  static void one_tree(const cmm_forward_call* call) {
    const int64_t hidden = call->layer.hidden, row_bytes = hidden * sizeof(Element);
    const bool stream = call->tokens * row_bytes >= kStreamBytes && row_bytes % 64 == 0 && (uintptr_t)call->y % 64 == 0;
    for (int64_t first = 0; first < call->tokens; first += kPassTokens) {
      const int64_t tokens = call->tokens - first < kPassTokens ? call->tokens - first : kPassTokens;
      TreePass<X, Y, W> pass(call, 0, first, tokens, (Element*)call->y + first * hidden, call->scratch);
      if (stream)
        pass.template run<kStream>(call->parallel, call->threads);
      else
        pass.template run<kStore>(call->parallel, call->threads);
    }
  }

  static void several_trees(const cmm_forward_call* call, int64_t lot) {
    const int64_t hidden = call->layer.hidden, chunk = chunk_tokens(call), chunks = (call->tokens + chunk - 1) / chunk;
    char* memory = (char*)call->scratch + lot * chunk_bytes(call);
    float* sums = (float*)memory;
    for (int64_t c = chunks * lot / call->threads; c < chunks * (lot + 1) / call->threads; ++c) {
      const int64_t first = c * chunk, tokens = call->tokens - first < chunk ? call->tokens - first : chunk;
      Element* out = (Element*)call->y + first * hidden;
      // float32 outputs are summed in place
      float* y = sizeof(Element) == 4 ? (float*)out : sums;
      for (int32_t tree = 0; tree < call->layer.trees; ++tree) {
        TreePass<X, F32, W> pass(call, tree, first, tokens, y, memory + round_up(chunk * hidden * 4, 64));
        if (tree == 0)
          pass.template run<kStore>(serial, 1);
        else
          pass.template run<kAdd>(serial, 1);
      }
      if (sizeof(Element) == 2) narrow(sums, (uint16_t*)out, tokens * hidden);
    }
  }

  static void narrow(const float* from, uint16_t* to, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) BF16::store(to + i, F32::load(from + i));
    if (i < count) BF16::store_part(to + i, F32::load_part(from + i, (int)(count - i)), (int)(count - i));
  }

  static size_t backward_scratch(const cmm_backward_call* call) { return BackwardMemory::bytes(call); }

  static void backward(const cmm_backward_call* call) {
    const BackwardMemory memory = BackwardMemory::of(call);
    const int64_t hidden = call->layer.hidden, row_bytes = hidden * sizeof(Element);
    if (BackwardMemory::sums_apart(call)) {
      backward_trees<F32, false>(call, memory, memory.grad_x);
      narrow(memory.grad_x, (uint16_t*)call->grad_x, call->tokens * hidden);
    } else if (call->layer.trees == 1 && call->tokens * row_bytes >= kStreamBytes && row_bytes % 64 == 0 &&
               (uintptr_t)call->grad_x % 64 == 0) {
      backward_trees<X, true>(call, memory, (Element*)call->grad_x);
    } else {
      backward_trees<X, false>(call, memory, (Element*)call->grad_x);
    }
  }

  template <class G, bool kStreamed>
  static void backward_trees(const cmm_backward_call* call, const BackwardMemory& memory, typename G::type* grad_x) {
    for (int32_t tree = 0; tree < call->layer.trees; ++tree) {
      TreeBackward<X, G, W> pass(call, tree, memory, grad_x);
      if (tree)
        pass.template run<kAdd>();
      else
        pass.template run<kStreamed ? kStream : kStore>();
    }
  }
};

// Calls f with the kernels for the element types of the layer.
template <class F>
CMM_INLINE auto with_types(const cmm_layer& layer, F f) {
  if (layer.w_dtype == CMM_F32) return f(Kernels<F32, F32, F32>());
  if (layer.x_dtype == CMM_F32) return f(Kernels<F32, F32, BF16>());
  return f(Kernels<BF16, BF16, BF16>());
}

// The same, and those for 8-bit weights, which have no backward pass.
template <class F>
CMM_INLINE auto with_forward_types(const cmm_layer& layer, F f) {
  if (layer.w_dtype != CMM_I8) return with_types(layer, f);
  if (layer.x_dtype == CMM_F32) return f(Int8Kernels<F32, Kernels<I16, F32, I8>, kPassTokens>());
  return f(Int8Kernels<BF16, Kernels<I16, BF16, I8>, kPassTokens>());
}

size_t forward_scratch(const cmm_forward_call* call) {
  return with_forward_types(call->layer, [&](auto k) { return k.forward_scratch(call); });
}
void forward(const cmm_forward_call* call) {
  with_forward_types(call->layer, [&](auto k) { k.forward(call); });
}
size_t backward_scratch(const cmm_backward_call* call) {
  return with_types(call->layer, [&](auto k) { return k.backward_scratch(call); });
}
void backward(const cmm_backward_call* call) {
  with_types(call->layer, [&](auto k) { k.backward(call); });
}

}  // namespace CMM_ISA
