// Forward pass of one token: all its dot products down the path, the activations at once, then one combination.
#pragma once
#include "activation.h"
#include "cmm.h"
#include "int8.h"

namespace CMM_ISA {

CMM_INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Working memory in parts that begin at 64 bytes: how many all take, and each laid from `memory` on.
// lay_out(take) calls take(bytes) for each.
template <class LayOut>
size_t bytes_of(LayOut lay_out) {
  int64_t total = 0;
  lay_out([&](int64_t bytes) {
    total += round_up(bytes, 64);
    return (void*)nullptr;
  });
  return (size_t)total;
}
template <class LayOut>
void lay_from(void* memory, LayOut lay_out) {
  char* at = (char*)memory;
  lay_out([&](int64_t bytes) {
    void* here = at;
    at += round_up(bytes, 64);
    return here;
  });
}

// x . w; `later` is a row as long as w that is wanted when the walk is over: its lines are asked for meanwhile, a few a step.
template <class X, class W>
CMM_INLINE float dot(const typename X::type* x, const typename W::type* w, int64_t hidden, const typename W::type* later) {
  if constexpr (W::kScaled) return integer_dot(x, w, hidden);
  // FMA latency is 4 cycles at one or two a cycle: four to eight sums in flight
  constexpr int kLines = (4 * kLanes * sizeof(typename W::type) + 63) / 64;
  vf s0 = zero(), s1 = zero(), s2 = zero(), s3 = zero();
  int64_t i = 0;
  for (; i + 4 * kLanes <= hidden; i += 4 * kLanes) {
    CMM_UNROLL for (int line = 0; line < kLines; ++line) __builtin_prefetch((const char*)(later + i) + 64 * line);
    s0 += X::load(x + i) * W::load(w + i);
    s1 += X::load(x + i + kLanes) * W::load(w + i + kLanes);
    s2 += X::load(x + i + 2 * kLanes) * W::load(w + i + 2 * kLanes);
    s3 += X::load(x + i + 3 * kLanes) * W::load(w + i + 3 * kLanes);
  }
  for (; i + kLanes <= hidden; i += kLanes) s0 += X::load(x + i) * W::load(w + i);
  if (i < hidden) s1 += X::load_part(x + i, (int)(hidden - i)) * W::load_part(w + i, (int)(hidden - i));
  return sum((s0 + s1) + (s2 + s3));
}

// out[0, hidden) = sum of coefficient[k] * rows[k], in registers of `kBlock` vectors a pass.
template <class Y, class W>
CMM_INLINE void combine_rows(const float* coefficient, const typename W::type* const* rows, int64_t count, typename Y::type* out,
                             int64_t hidden) {
  constexpr int kBlock = 8;
  int64_t i = 0;
  for (; i + kBlock * kLanes <= hidden; i += kBlock * kLanes) {
    vf total[kBlock] = {};
    for (int64_t k = 0; k < count; ++k)
      for (int j = 0; j < kBlock; ++j) total[j] += coefficient[k] * W::load(rows[k] + i + j * kLanes);
    for (int j = 0; j < kBlock; ++j) Y::store(out + i + j * kLanes, total[j]);
  }
  for (; i < hidden; i += kLanes) {
    int n = (int)(hidden - i < kLanes ? hidden - i : kLanes);
    vf total = zero();
    for (int64_t k = 0; k < count; ++k) total += coefficient[k] * W::load_part(rows[k] + i, n);
    Y::store_part(out + i, total, n);
  }
}

// Buffers of one thread: logits and activations of one token, and the addresses of its rows.
template <class W>
struct TokenBuffers {
  float *logits, *hidden, *slope;
  const typename W::type** rows;
  static size_t bytes(const cmm_layer& layer) {
    int64_t active = round_up((int64_t)layer.trees * layer.levels, 16);
    return (size_t)active * (3 * sizeof(float) + sizeof(void*));
  }
  TokenBuffers(const cmm_layer& layer, void* memory) {
    int64_t active = round_up((int64_t)layer.trees * layer.levels, 16);
    rows = (const typename W::type**)memory;
    logits = (float*)(rows + active);
    hidden = logits + active;
    slope = hidden + active;
    for (int64_t i = 0; i < active; ++i) logits[i] = 0;
  }
};

template <class X, class Y, class W>
void forward_token(const cmm_forward_call* call, int64_t token, const TokenBuffers<W>& buffers) {
  const cmm_layer& layer = call->layer;
  const int64_t hidden = layer.hidden, active = (int64_t)layer.trees * layer.levels;
  const auto* x = (const typename X::type*)call->x + token * hidden;
  for (int32_t tree = 0, at = 0; tree < layer.trees; ++tree) {
    const auto* w_in = (const typename W::type*)layer.w_in + (int64_t)tree * layer.nodes * hidden;
    const auto* w_out = (const typename W::type*)layer.w_out + (int64_t)tree * layer.nodes * hidden;
    const auto* b_in = layer.b_in ? (const typename W::Bias::type*)layer.b_in + (int64_t)tree * layer.nodes : nullptr;
    int64_t node = 0;
    for (int32_t level = 0; level < layer.levels; ++level, ++at) {
      if (b_in) __builtin_prefetch(b_in + node);
      float logit = dot<X, W>(x, w_in + node * hidden, hidden, w_out + node * hidden);
      if constexpr (W::kScaled) logit *= layer.scale_in[(int64_t)tree * layer.nodes + node] * call->x_scale[token];
      if (b_in) logit += W::Bias::scalar(b_in[node]);
      buffers.logits[at] = logit;
      buffers.rows[at] = w_out + node * hidden;
      if constexpr (W::kScaled) buffers.slope[at] = layer.scale_out[(int64_t)tree * layer.nodes + node];
      if (level + 1 == layer.levels && call->leaves) call->leaves[token * layer.trees + tree] = (int32_t)node;
      node = 2 * node + 1 + (logit > 0.0f);
    }
  }
  if (call->logits) memcpy(call->logits + token * active, buffers.logits, active * sizeof(float));
  activate(layer.activation, buffers.logits, buffers.hidden, nullptr, active);
  if constexpr (W::kScaled)
    for (int64_t k = 0; k < active; ++k) buffers.hidden[k] *= buffers.slope[k];
  combine_rows<Y, W>(buffers.hidden, buffers.rows, active, (typename Y::type*)call->y + token * hidden, hidden);
}

// out += a * row
template <class W>
CMM_INLINE void add_scaled(float* out, float a, const typename W::type* row, int64_t hidden) {
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) F32::store(out + i, F32::load(out + i) + a * W::load(row + i));
  if (i < hidden) {
    int n = (int)(hidden - i);
    F32::store_part(out + i, F32::load_part(out + i, n) + a * W::load_part(row + i, n), n);
  }
}

}  // namespace CMM_ISA
