// Backward pass: tokens sorted by leaf, so that those of one path are computed together and a gradient row is touched once a group.
// Each subtree below kSharedLevels belongs to one lot; the rows above are summed a lot and added in the order of the lots, so the
// result depends on the number of threads alone.
#pragma once
#include <utility>

#include "tile.h"
#include "token_walk.h"

namespace CMM_ISA {

constexpr int kSharedLevels = 6;
constexpr int64_t kLeastTokensALot = 256;
constexpr int kDigitBits = 11;   // of the radix sort by leaf
constexpr int kTokensAhead = 24;  // tokens between the prefetch of a row and its use

// Working memory of the backward pass of one tree.
struct BackwardMemory {
  int32_t *order, *other;
  uint8_t* visited;  // by node
  int64_t* bounds;   // of the lots in `order`
  float* shared;     // [lots, 2, shared rows, hidden], then [lots, shared rows] for biases
  float* grad_x;     // [tokens, hidden], where sums over trees cannot be kept in the output itself

  static int shared_levels(const cmm_layer& layer) { return layer.levels - 1 < kSharedLevels ? layer.levels - 1 : kSharedLevels; }
  static int64_t shared_rows(const cmm_layer& layer) { return (int64_t(1) << shared_levels(layer)) - 1; }
  static int64_t lots(const cmm_backward_call* call) {
    const int64_t most = call->tokens / kLeastTokensALot, threads = call->threads < most ? call->threads : most;
    return shared_levels(call->layer) > 0 && threads > 1 ? threads : 1;
  }
  static bool sums_apart(const cmm_backward_call* call) { return call->layer.trees > 1 && call->layer.x_dtype == CMM_BF16; }

  template <class Take>
  void lay_out(const cmm_backward_call* call, Take take) {
    const cmm_layer& layer = call->layer;
    order = (int32_t*)take(call->tokens * 4);
    other = (int32_t*)take(call->tokens * 4);
    visited = (uint8_t*)take(layer.nodes);
    bounds = (int64_t*)take((lots(call) + 1) * 8);
    shared = (float*)take(lots(call) > 1 ? lots(call) * shared_rows(layer) * (2 * layer.hidden + 1) * 4 : 0);
    grad_x = (float*)take(sums_apart(call) ? call->tokens * layer.hidden * 4 : 0);
  }
  static size_t bytes(const cmm_backward_call* call) {
    return bytes_of([&](auto take) { BackwardMemory().lay_out(call, take); });
  }
  static BackwardMemory of(const cmm_backward_call* call) {
    BackwardMemory memory;
    lay_from(call->scratch, [&](auto take) { memory.lay_out(call, take); });
    return memory;
  }
};

// The backward pass of one tree; Y is the type of the rows `grad_x`.
template <class X, class Y, class W>
struct TreeBackward {
  const cmm_backward_call* call;
  int32_t tree_index;
  Tree<W> tree;
  BackwardMemory memory;
  typename Y::type* grad_x;
  float *grad_in, *grad_out, *grad_bias;
  int64_t lots;
  int shared;

  TreeBackward(const cmm_backward_call* call, int32_t index, const BackwardMemory& memory, typename Y::type* grad_x)
      : call(call),
        tree_index(index),
        tree(call->layer, index),
        memory(memory),
        grad_x(grad_x),
        grad_in(call->grad_w_in ? call->grad_w_in + (int64_t)index * call->layer.nodes * call->layer.hidden : nullptr),
        grad_out(call->grad_w_in ? call->grad_w_out + (int64_t)index * call->layer.nodes * call->layer.hidden : nullptr),
        grad_bias(call->grad_b_in ? call->grad_b_in + (int64_t)index * call->layer.nodes : nullptr),
        lots(BackwardMemory::lots(call)),
        shared(lots > 1 ? BackwardMemory::shared_levels(call->layer) : 0) {}

  int32_t leaf(int64_t token) const { return call->leaves[token * call->layer.trees + tree_index]; }
  const typename X::type* x_row(int64_t token) const { return (const typename X::type*)call->x + token * tree.hidden; }
  const typename X::type* grad_row(int64_t token) const { return (const typename X::type*)call->grad_y + token * tree.hidden; }

  void sort_by_leaf() {
    for (int64_t i = 0; i < call->tokens; ++i) memory.order[i] = (int32_t)i;
    const int32_t least = (int32_t)((int64_t(1) << (tree.levels - 1)) - 1);
    for (int shift = 0; shift < tree.levels - 1; shift += kDigitBits) {
      int32_t at[(1 << kDigitBits) + 1] = {};
      auto digit = [&](int32_t token) { return (leaf(token) - least) >> shift & ((1 << kDigitBits) - 1); };
      for (int64_t i = 0; i < call->tokens; ++i) ++at[digit(memory.order[i]) + 1];
      for (int d = 0; d < 1 << kDigitBits; ++d) at[d + 1] += at[d];
      for (int64_t i = 0; i < call->tokens; ++i) memory.other[at[digit(memory.order[i])]++] = memory.order[i];
      std::swap(memory.order, memory.other);
    }
  }

  // Even shares of the sorted tokens, moved to where the next subtree below the shared levels begins.
  void share_out() {
    memory.bounds[0] = 0;
    for (int64_t lot = 1; lot <= lots; ++lot) {
      int64_t at = call->tokens * lot / lots;
      if (at < memory.bounds[lot - 1]) at = memory.bounds[lot - 1];
      while (at > 0 && at < call->tokens && subtree(at) == subtree(at - 1)) ++at;
      memory.bounds[lot] = at;
    }
  }
  int32_t subtree(int64_t i) const { return (leaf(memory.order[i]) + 1) >> (tree.levels - 1 - shared); }

  // Gradient row of `node` at `level`: the lot's own above the shared levels.
  float* row_of(float* grad, int which, int64_t lot, int level, int64_t node) const {
    if (level >= shared) return grad + node * tree.hidden;
    const int64_t rows = BackwardMemory::shared_rows(call->layer);
    return memory.shared + ((lot * 2 + which) * rows + node) * tree.hidden;
  }
  float* bias_of(int64_t lot, int level, int64_t node) const {
    if (level >= shared) return grad_bias + node;
    const int64_t rows = BackwardMemory::shared_rows(call->layer);
    return memory.shared + lots * 2 * rows * tree.hidden + lot * rows + node;
  }

  struct Path {
    int64_t node[kMaxLevels];
    const typename W::type *in[kMaxLevels], *out[kMaxLevels];
    float *grad_in[kMaxLevels], *grad_out[kMaxLevels];
  };

  // Moves to the path of `leaf`; rows that no token of the lot has touched yet are zeroed.
  void enter(Path& path, int64_t lot, int64_t node) const {
    for (int level = tree.levels - 1; level >= 0 && path.node[level] != node; --level, node = (node - 1) / 2) {
      path.node[level] = node;
      path.in[level] = tree.w_in + node * tree.hidden;
      path.out[level] = tree.w_out + node * tree.hidden;
      if (!grad_in) continue;
      path.grad_in[level] = row_of(grad_in, 0, lot, level, node);
      path.grad_out[level] = row_of(grad_out, 1, lot, level, node);
      memset(path.grad_in[level], 0, tree.hidden * sizeof(float));
      memset(path.grad_out[level], 0, tree.hidden * sizeof(float));
      if (grad_bias) *bias_of(lot, level, node) = 0;
      if (level >= shared) memory.visited[node] = 1;
    }
  }

  template <Store kHow>
  void walk_lot(int64_t lot) const {
    const int64_t rows = BackwardMemory::shared_rows(call->layer), begin = memory.bounds[lot], end = memory.bounds[lot + 1];
    if (shared && grad_in) {
      memset(memory.shared + lot * 2 * rows * tree.hidden, 0, 2 * rows * tree.hidden * sizeof(float));
      memset(memory.shared + lots * 2 * rows * tree.hidden + lot * rows, 0, rows * sizeof(float));
    }
    Path path;
    for (int64_t& node : path.node) node = -1;
    for (int64_t at = begin; at < end;) {
      const int32_t node = leaf(memory.order[at]);
      int count = 1;
      while (count < kBlock && at + count < end && leaf(memory.order[at + count]) == node) ++count;
      enter(path, lot, node);
      block<kHow>(path, lot, at, count, end);
      at += count;
    }
#if defined(__AVX2__)
    if (kHow == kStream) _mm_sfence();
#endif
  }

  template <Store kHow>
  void block(const Path& path, int64_t lot, int64_t at, int count, int64_t end) const {
    const int levels = tree.levels, active = count * levels;
    alignas(64) float logits[kBlock * kMaxLevels + 64], hidden[kBlock * kMaxLevels + 64], slope[kBlock * kMaxLevels + 64];
    float grad[kBlock * kMaxLevels], grad_by_level[kMaxLevels * kBlock], hidden_by_level[kMaxLevels * kBlock];
    const typename X::type *x[kBlock], *grad_y[kBlock];
    typename Y::type* out[kBlock];
    Ahead ahead;
    for (int t = 0; t < count; ++t) {
      const int64_t token = memory.order[at + t];
      x[t] = x_row(token), grad_y[t] = grad_row(token), out[t] = grad_x + token * tree.hidden;
      memcpy(logits + t * levels, call->logits + (token * call->layer.trees + tree_index) * levels, levels * sizeof(float));
      if (at + t + kTokensAhead < end) {
        const int64_t later = memory.order[at + t + kTokensAhead];
        ahead.add(grad_row(later)), ahead.add(x_row(later));
      }
    }
    for (int i = active; i < active + kLanes; ++i) logits[i] = 0;
    activate(call->layer.activation, logits, hidden, slope, active);

    for (int level = 0; level < levels; level += 3) {
      const typename W::type* nodes[3];
      for (int n = 0; n < 3; ++n) nodes[n] = path.out[level + n < levels ? level + n : levels - 1];
      const char* later[kAheadRows];
      ahead.take(later, kAheadRows, nodes[0]);
      float found[3 * kBlock];
      with_count(count, [&](auto n) { dots_of<3, n.value, X, W>(grad_y, nodes, tree.hidden, later, found); });
      for (int n = 0; n < 3 && level + n < levels; ++n)
        for (int t = 0; t < count; ++t) {
          const int i = t * levels + level + n;
          grad[i] = found[n * kBlock + t] * slope[i];
          grad_by_level[(level + n) * kBlock + t] = grad[i];
          hidden_by_level[(level + n) * kBlock + t] = hidden[i];
        }
    }
    if (grad_bias)
      for (int level = 0; level < levels; ++level) {
        float total = 0;
        for (int t = 0; t < count; ++t) total += grad_by_level[level * kBlock + t];
        *bias_of(lot, level, path.node[level]) += total;
      }

    const char* later[kAheadRows];
    ahead.take(later, kAheadRows, path.in[0]);
    const float* weights[kBlock];
    for (int t = 0; t < count; ++t) weights[t] = grad + t * levels;
    with_count(count, [&](auto n) { combine_of<n.value, kHow, Y, W>(weights, path.in, levels, out, tree.hidden, later); });
    for (int level = 0; grad_in && level < levels; level += kBlock) {
      const int n_rows = levels - level < kBlock ? levels - level : kBlock;
      add_rows(grad_by_level + level * kBlock, x, count, path.grad_in + level, n_rows);
      add_rows(hidden_by_level + level * kBlock, grad_y, count, path.grad_out + level, n_rows);
    }
  }

  // grads[n] += sum over tokens t of coefficients[n][t] * rows[t]
  void add_rows(const float* coefficients, const typename X::type* const* rows, int count, float* const* grads, int n_rows) const {
    const float* weights[kBlock];
    const char* none[kAheadRows];
    for (int n = 0; n < n_rows; ++n) weights[n] = coefficients + n * kBlock;
    for (const char*& each : none) each = (const char*)rows[0];
    with_count(n_rows, [&](auto n) { combine_of<n.value, kAdd, F32, X>(weights, rows, count, grads, tree.hidden, none); });
  }

  // Adds up the shared rows lot by lot, and zeroes the rows that no token visited.
  void finish(int64_t part, int64_t parts) const {
    const int64_t rows = BackwardMemory::shared_rows(call->layer), hidden = tree.hidden;
    for (int64_t node = tree_nodes() * part / parts; node < tree_nodes() * (part + 1) / parts; ++node) {
      if (memory.visited[node]) continue;
      float *in = grad_in + node * hidden, *out = grad_out + node * hidden;
      memset(in, 0, hidden * sizeof(float));
      memset(out, 0, hidden * sizeof(float));
      if (grad_bias) grad_bias[node] = 0;
      if (!shared || node >= rows) continue;
      for (int64_t lot = 0; lot < lots; ++lot) {
        add_scaled<F32>(in, 1.0f, memory.shared + (lot * 2 * rows + node) * hidden, hidden);
        add_scaled<F32>(out, 1.0f, memory.shared + ((lot * 2 + 1) * rows + node) * hidden, hidden);
        if (grad_bias) grad_bias[node] += memory.shared[lots * 2 * rows * hidden + lot * rows + node];
      }
    }
  }
  int64_t tree_nodes() const { return call->layer.nodes; }

  template <Store kHow>
  void run() {
    memset(memory.visited, 0, call->layer.nodes);
    sort_by_leaf();
    share_out();
    call->parallel(lots, [](void* self, int64_t lot) { ((TreeBackward*)self)->template walk_lot<kHow>(lot); }, this);
    if (!grad_in) return;
    call->parallel(lots, [](void* self, int64_t lot) { ((TreeBackward*)self)->finish(lot, ((TreeBackward*)self)->lots); }, this);
  }
};

}  // namespace CMM_ISA
