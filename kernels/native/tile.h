// A tile: up to kTile tokens that walk some levels together, regrouped by node after every pass so that a row serves many tokens.
#pragma once
#include "activation.h"
#include "cmm.h"
#include "combine.h"
#include "int8.h"

namespace CMM_ISA {

constexpr int kTile = 128;  // 128 rows of 3 KB stay in a second-level cache with the rows of the top levels
constexpr int kMaxLevels = 31;

// A number for each token of a block.
typedef float vb __attribute__((vector_size(kBlock * 4)));
typedef int32_t vi __attribute__((vector_size(kBlock * 4)));
CMM_INLINE vb block_at(const float* p) {
  vb a;
  memcpy(&a, p, sizeof a);
  return a;
}

// Weights of one tree.
template <class W>
struct Tree {
  const typename W::type *w_in, *w_out;
  const typename W::Bias::type* b_in;
  const float *scale_in, *scale_out;
  int64_t hidden;
  int levels;
  Tree(const cmm_layer& layer, int32_t tree)
      : w_in((const typename W::type*)layer.w_in + (int64_t)tree * layer.nodes * layer.hidden),
        w_out((const typename W::type*)layer.w_out + (int64_t)tree * layer.nodes * layer.hidden),
        b_in(layer.b_in ? (const typename W::Bias::type*)layer.b_in + (int64_t)tree * layer.nodes : nullptr),
        scale_in(W::kScaled ? layer.scale_in + (int64_t)tree * layer.nodes : nullptr),
        scale_out(W::kScaled ? layer.scale_out + (int64_t)tree * layer.nodes : nullptr),
        hidden(layer.hidden),
        levels(layer.levels) {}
  float bias(int64_t node) const { return b_in ? W::Bias::scalar(b_in[node]) : 0.0f; }
  // Logits of dot products `found` of row `node` with tokens of scales `x_scale`.
  CMM_INLINE vb logit(vb found, int64_t node, float bias, vb x_scale) const {
    if constexpr (W::kScaled) return found * (scale_in[node] * x_scale) + bias;
    return found + bias;
  }
};

// Rows to bring into the cache while this tile is computed: those of the next one.
struct Ahead {
  const char* rows[kTile + 64];
  int next = 0, count = 0;
  void add(const void* row) {
    if (count < kTile + 64) rows[count++] = (const char*)row;
  }
  // `n` rows; `spare`, which is in the cache, where there are no more
  CMM_INLINE void take(const char** into, int n, const void* spare) {
    for (int i = 0; i < n; ++i) into[i] = next < count ? rows[next++] : (const char*)spare;
  }
};

struct Group {
  int32_t node, begin, end;  // tokens order[begin, end) stand at node
};

// Tokens are numbers of rows; a walk sorts those of a tile where they lie.
template <class X>
struct Tile {
  const typename X::type* x;  // [tokens, hidden]
  const float* x_scale;       // [tokens], where weights are scaled
  float* logits;              // [tokens, stride]
  int64_t hidden;
  int stride;
  int32_t* order;
  int size = 0, num_groups = 0;
  Group groups[kTile];
  const typename X::type* row(int32_t token) const { return x + token * hidden; }
  float* logits_of(int32_t token) const { return logits + (int64_t)token * stride; }
};

// Calls f(integral_constant<T>) for a run-time count of 1 to kBlock tokens.
template <int T>
struct Count {
  static constexpr int value = T;
};
template <int T = kBlock, class F>
CMM_INLINE void with_count(int count, F f) {
  if constexpr (T == 1) {
    f(Count<1>());
  } else {
    if (count == T) return f(Count<T>());
    with_count<T - 1>(count, f);
  }
}

// logits[n * kBlock + t] = x[t] . nodes[n], whatever T.
template <int kNodes, int T, class X, class W>
__attribute__((noinline)) void dots_of(const typename X::type* const* x, const typename W::type* const* nodes, int64_t hidden,
                                       const char* const* ahead, float* logits) {
  float out[kNodes * T];
  dots<kNodes, T, X, W>(x, nodes, hidden, ahead, out);
  CMM_UNROLL for (int n = 0; n < kNodes; ++n) memcpy(logits + n * kBlock, out + n * T, T * sizeof *out);
}

// Four counters below 2**16 in one register, by key.
struct Quarters {
  uint64_t all = 0;
  CMM_INLINE void add(int key, int n = 1) { all += (uint64_t)n << (16 * key); }
  CMM_INLINE int of(int key) const { return (int)(all >> (16 * key) & 0xffff); }
};

// One pass over the groups of a tile: logits of one level, or of two (a node and both children for all its tokens: a third of
// the work goes unused, and the tokens are read half as often). Regroups the tokens; a final pass groups them by their leaf.
template <int kPass, class X, class W>
void pass(Tile<X>& tile, const Tree<W>& tree, int level, bool final, Ahead& ahead) {
  constexpr int kNodes = kPass == 2 ? 3 : 1;
  // a call a group or less: the rows of the groups to come are what is missing, not those of the next tile
  const bool scattered = tile.num_groups * kBlock >= tile.size;
  constexpr int kGroupsAhead = kPass == 2 ? 1 : 2;
  Group next[kTile];
  int32_t order[kTile], keys[kTile + kBlock];
  int num_next = 0;
  for (int g = 0; g < tile.num_groups; ++g) {
    const Group group = tile.groups[g];
    const int64_t node = group.node, left = 2 * node + 1;
    const typename W::type* family[3] = {tree.w_in + node * tree.hidden};
    if (kPass == 2) family[1] = tree.w_in + left * tree.hidden, family[2] = family[1] + tree.hidden;
    const float bias[3] = {tree.bias(node), kPass == 2 ? tree.bias(left) : 0.0f, kPass == 2 ? tree.bias(left + 1) : 0.0f};
    Quarters counts;
    for (int at = group.begin; at < group.end; at += kBlock) {
      const int count = group.end - at < kBlock ? group.end - at : kBlock;
      const int32_t* tokens = tile.order + at;
      const typename X::type* x[kBlock];
      for (int t = 0; t < count; ++t) x[t] = tile.row(tokens[t]);
      const char* rows[kAheadRows];
      if (scattered) {
        const int64_t later = tile.groups[g + kGroupsAhead < tile.num_groups ? g + kGroupsAhead : g].node;
        rows[0] = (const char*)(tree.w_in + later * tree.hidden);
        rows[1] = (const char*)(tree.w_out + node * tree.hidden);
        for (int r = 2; r < kAheadRows; ++r)
          rows[r] = (const char*)(kPass == 2 ? tree.w_in + (2 * later + r - 1) * tree.hidden : family[0]);
      } else {
        ahead.take(rows, kAheadRows, family[0]);
      }
      float found[3 * kBlock] = {};
      with_count(count, [&](auto n) { dots_of<kNodes, n.value, X, W>(x, family, tree.hidden, rows, found); });
      vb x_scale = {}, lower = {};
      for (int t = 0; W::kScaled && t < count; ++t) x_scale[t] = tile.x_scale[tokens[t]];
      // whole vectors, whatever the count: which way a token goes cannot be predicted, so nothing may branch on it
      const vb upper = tree.logit(block_at(found), node, bias[0], x_scale);
      const vi right = upper > 0.0f;
      vi key = {};
      if (kPass == 2) {
        const vb l = tree.logit(block_at(found + kBlock), left, bias[1], x_scale);
        const vb r = tree.logit(block_at(found + 2 * kBlock), left + 1, bias[2], x_scale);
        lower = right ? r : l;
        key = final ? -right : -2 * right - (lower > 0.0f);
      } else if (!final) {
        key = -right;
      }
      memcpy(keys + at, &key, sizeof key);
      for (int t = 0; t < count; ++t) {
        float* logits = tile.logits_of(tokens[t]) + level;
        logits[0] = upper[t];
        if (kPass == 2) logits[1] = lower[t];
        counts.add(key[t]);
      }
    }
    // a final pass of one level stays at its node, any other goes to a child, or after two levels to a grandchild
    const int64_t first = kPass == 1 && final ? node : (kPass == 2 && !final ? 4 * node + 3 : left);
    Quarters place;
    for (int key = 0, at = group.begin; key < 4; ++key) {
      const int count = counts.of(key);
      place.add(key, at);
      if (count) next[num_next++] = {(int32_t)(first + key), at, at + count};
      at += count;
    }
    for (int i = group.begin; i < group.end; ++i) {
      order[place.of(keys[i])] = tile.order[i];
      place.add(keys[i]);
    }
  }
  memcpy(tile.order, order, tile.size * sizeof *order);
  memcpy(tile.groups, next, num_next * sizeof(Group));
  tile.num_groups = num_next;
}

// Walks the tokens of a tile from `root` at level `begin` down to level `end`.
template <class X, class W>
void descend(Tile<X>& tile, const Tree<W>& tree, int32_t root, int begin, int end, Ahead& ahead) {
  tile.groups[0] = {root, 0, tile.size};
  tile.num_groups = 1;
  while (begin < end) {
    // where tokens are alone at their nodes, memory is the limit and an unused row costs more than reading a token twice
    const bool two = begin + 1 < end && tile.num_groups * 2 <= tile.size;
    const bool final = begin + (two ? 2 : 1) == tree.levels;
    if (two)
      pass<2, X, W>(tile, tree, begin, final, ahead);
    else
      pass<1, X, W>(tile, tree, begin, final, ahead);
    begin += two ? 2 : 1;
  }
}

template <int T, Store kHow, class Y, class W>
__attribute__((noinline)) void combine_of(const float* const* weights, const typename W::type* const* rows, int levels,
                                          typename Y::type* const* y, int64_t hidden, const char* const* ahead) {
  Combine<T, kHow, Y, W>::run(weights, rows, levels, y, hidden, ahead);
}

// y [tokens, hidden] of the tokens of a tile that stands at its leaves; `hidden` are its activations [size, stride], in its order,
// which scales of rows are multiplied into.
template <Store kHow, class X, class Y, class W>
void combine(Tile<X>& tile, const Tree<W>& tree, float* hidden, typename Y::type* y, Ahead& ahead) {
  const int stride = tile.stride;
#if defined(__AVX512BF16__)
  constexpr bool kPairs = sizeof(typename Y::type) == 2 && sizeof(typename W::type) == 2 && kHow != kAdd;
  const int pairs = (tree.levels + 1) / 2;
  alignas(64) uint32_t packed[kPairs ? kTile * (kMaxLevels + 1) / 2 : 1];
  if constexpr (kPairs) {
    uint16_t* out = (uint16_t*)packed;
    for (int i = 0; i < tile.size; ++i) {
      for (int k = 0; k < tree.levels; k += 16) {
        const int n = tree.levels - k < 16 ? tree.levels - k : 16;
        const __mmask16 mask = (__mmask16)((1u << n) - 1);
        // the mask leaves a zero beside the last level of an odd number
        _mm256_mask_storeu_epi16(out + 2 * pairs * i + k, (__mmask16)((1u << (n + n % 2)) - 1),
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, hidden + i * stride + k)));
      }
    }
  }
#endif
  const bool scattered = tile.num_groups * 2 > tile.size;
  for (int g = 0; g < tile.num_groups; ++g) {
    const Group group = tile.groups[g];
    const typename W::type* rows[kMaxLevels];
    int64_t node = group.node;
    for (int level = tree.levels - 1; level >= 0; --level, node = (node - 1) / 2) {
      rows[level] = tree.w_out + node * tree.hidden;
      if constexpr (W::kScaled)
        for (int i = group.begin; i < group.end; ++i) hidden[i * stride + level] *= tree.scale_out[node];
    }
    // even shares: of few tokens the multiply-adds wait for one another
    const int all = group.end - group.begin, blocks = (all + kBlock - 1) / kBlock;
    for (int block = 0, at = group.begin, count; block < blocks; ++block, at += count) {
      count = all * (block + 1) / blocks - all * block / blocks;
      typename Y::type* out[kBlock];
      const char* later[kAheadRows];
      if (scattered && g + 1 < tile.num_groups) {
        int64_t next = tile.groups[g + 1].node;
        for (int r = 0; r < kAheadRows; ++r, next = next > 0 ? (next - 1) / 2 : 0) later[r] = (const char*)(tree.w_out + next * tree.hidden);
      } else {
        ahead.take(later, kAheadRows, rows[0]);
      }
      for (int t = 0; t < count; ++t) out[t] = y + tile.order[at + t] * tree.hidden;
#if defined(__AVX512BF16__)
      if constexpr (kPairs) {
        const uint32_t* weights[kBlock];
        for (int t = 0; t < count; ++t) weights[t] = packed + (at + t) * pairs;
        with_count(count, [&](auto n) { CombinePairs<n.value, kHow>::run(weights, rows, tree.levels, out, tree.hidden, later); });
        continue;
      }
#endif
      const float* weights[kBlock];
      for (int t = 0; t < count; ++t) weights[t] = hidden + (at + t) * stride;
      with_count(count, [&](auto n) { combine_of<n.value, kHow, Y, W>(weights, rows, tree.levels, out, tree.hidden, later); });
    }
  }
}

}  // namespace CMM_ISA
