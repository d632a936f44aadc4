// Forward pass of many tokens, depth first: tokens are bucketed by node until a tile's worth shares a subtree, and the subtrees are
// then walked one by one, so that a row is read once for all its tokens.
#pragma once
#include "tile.h"
#include "token_walk.h"

namespace CMM_ISA {

constexpr int kSubtreeTokens = 64;   // tokens that a subtree should hold when the walk turns depth first
constexpr int kChunk = 1024;         // tokens that walk the top levels together, and all trees if there are several: 3 MB of rows
constexpr int kStepLevels = 4;       // levels between two bucketings
constexpr int64_t kStreamBytes = 2 << 20;  // outputs from this size on go past the caches

struct Piece {
  int32_t node, begin, end;  // tokens order[begin, end) stand at node
};

// Working memory of a pass over `tokens` tokens of one tree.
struct PassMemory {
  float* logits;   // [tokens, stride]
  int32_t* node;   // of each token, when the walk has reached `stop` levels
  int32_t* order;
  int32_t* counts;  // by node of the stop level
  Piece* pieces;
  static int stop_level(int64_t tokens, int levels) {
    int stop = 0;
    while (stop + kStepLevels / 2 < levels && (tokens >> (stop + 1)) >= kSubtreeTokens) stop += kStepLevels / 2;
    return stop < 16 ? stop : 16;
  }
  // floats between the logits of two tokens: whole vectors, so that activations need no copy
  static int stride(int levels) { return (int)round_up(levels, 16); }
  static size_t bytes(int64_t tokens, int levels) {
    const int64_t buckets = (int64_t(1) << stop_level(tokens, levels)) + 1;
    return (size_t)(tokens * stride(levels) * 4 + 2 * round_up(tokens * 4, 64) + round_up(buckets * 4, 64) +
                    round_up((buckets + tokens / kTile + 1) * sizeof(Piece), 64));
  }
  PassMemory(void* memory, int64_t tokens, int levels) {
    const int64_t buckets = (int64_t(1) << stop_level(tokens, levels)) + 1;
    char* at = (char*)memory;
    logits = (float*)at, at += tokens * stride(levels) * 4;
    node = (int32_t*)at, at += round_up(tokens * 4, 64);
    order = (int32_t*)at, at += round_up(tokens * 4, 64);
    counts = (int32_t*)at, at += round_up(buckets * 4, 64);
    pieces = (Piece*)at;
  }
};

// The pass of tokens [first, first + tokens) through one tree. Y is the type of the output rows `y`, [tokens, hidden].
template <class X, class Y, class W>
struct TreePass {
  const cmm_forward_call* call;
  int32_t tree_index;
  Tree<W> tree;
  int64_t first, tokens;
  typename Y::type* y;
  PassMemory memory;
  int stop, num_pieces = 0, lots = 1;

  TreePass(const cmm_forward_call* call, int32_t tree_index, int64_t first, int64_t tokens, typename Y::type* y, void* memory)
      : call(call),
        tree_index(tree_index),
        tree(call->layer, tree_index),
        first(first),
        tokens(tokens),
        y(y),
        memory(memory, tokens, call->layer.levels),
        stop(PassMemory::stop_level(tokens, call->layer.levels)) {}

  const typename X::type* x_row(int32_t token) const { return (const typename X::type*)call->x + (first + token) * tree.hidden; }

  void fill(Tile<X>& tile, const Piece& piece) const {
    tile.size = piece.end - piece.begin;
    for (int i = 0; i < tile.size; ++i) {
      const int32_t token = memory.order[piece.begin + i];
      tile.token[i] = token;
      tile.x[i] = x_row(token);
      if (call->x_scale) tile.x_scale[i] = call->x_scale[first + token];
      tile.logits[i] = memory.logits + (int64_t)token * PassMemory::stride(tree.levels);
    }
  }

  // One chunk of tokens down to the stop level: some levels in pieces of one node each, then sorted by node again.
  void route_chunk(int64_t chunk) const {
    const int begin = (int)(chunk * kChunk), end = (int)(begin + kChunk < tokens ? begin + kChunk : tokens);
    for (int i = begin; i < end; ++i) memory.order[i] = i, memory.node[i] = 0;
    Tile<X> tile;
    for (int level = 0; level < stop;) {
      const int next = level + kStepLevels < stop ? level + kStepLevels : stop;
      Piece piece = piece_at(begin, end), following;
      for (; piece.begin < end; piece = following) {
        following = piece_at(piece.end, end);
        fill(tile, piece);
        Ahead ahead;
        if (following.begin < end) announce(ahead, following, level, next, false);
        descend(tile, tree, piece.node, level, next, ahead);
        note(tile);
      }
      if (next < stop) sort_chunk(begin, end, next);
      level = next;
    }
  }

  // Tokens from order[begin] on that stand at one node, a tile at most.
  Piece piece_at(int begin, int end) const {
    if (begin == end) return {0, end, end};
    const int32_t node = memory.node[memory.order[begin]];
    int at = begin + 1;
    while (at < end && at < begin + kTile && memory.node[memory.order[at]] == node) ++at;
    return {node, begin, at};
  }

  void note(const Tile<X>& tile) const {
    for (int g = 0; g < tile.num_groups; ++g)
      for (int i = tile.groups[g].begin; i < tile.groups[g].end; ++i) memory.node[tile.token[tile.order[i]]] = tile.groups[g].node;
  }

  void sort_chunk(int begin, int end, int level) const {
    int32_t at[kChunk];
    const int32_t least = (1 << level) - 1, buckets = 1 << level;
    if (buckets > kChunk) return;  // tokens are nearly alone by then
    memset(at, 0, buckets * sizeof *at);
    for (int i = begin; i < end; ++i) ++at[memory.node[i] - least];
    for (int b = 0, sum = begin; b < buckets; ++b) sum += at[b], at[b] = sum - at[b];
    for (int i = begin; i < end; ++i) memory.order[at[memory.node[i] - least]++] = i;
  }

  // Sorts the tokens by their node at the stop level and cuts the sorted list into pieces of at most a tile.
  void bucket() {
    if (stop == 0) {
      for (int64_t i = 0; i < tokens; ++i) memory.order[i] = (int32_t)i;
      memory.counts[0] = (int32_t)tokens;
    } else {
      const int32_t least = (1 << stop) - 1;
      memset(memory.counts, 0, sizeof(int32_t) << stop);
      for (int64_t i = 0; i < tokens; ++i) ++memory.counts[memory.node[i] - least];
      int32_t at = 0;
      for (int32_t b = 0; b <= least; ++b) at += memory.counts[b], memory.counts[b] = at - memory.counts[b];
      for (int64_t i = 0; i < tokens; ++i) memory.order[memory.counts[memory.node[i] - least]++] = (int32_t)i;
    }
    int32_t at = 0;
    for (int32_t b = 0; b < 1 << stop; ++b) {
      const int32_t end = memory.counts[b];  // after the sort a count is the end of its bucket
      for (; at < end; at += kTile) memory.pieces[num_pieces++] = {(1 << stop) - 1 + b, at, end - at < kTile ? end : at + kTile};
      at = end;
    }
  }

  // Rows that the walk of a piece from `level` to `end` starts with: its tokens', and those of the top of its subtree.
  void announce(Ahead& ahead, const Piece& piece, int level, int end, bool outputs) const {
    for (int i = piece.begin; i < piece.end; ++i) ahead.add(x_row(memory.order[i]));
    for (int below = 0; below < kStepLevels && level + below < end; ++below)
      for (int64_t node = ((int64_t)(piece.node + 1) << below) - 1, n = 0; n < 1 << below; ++n) {
        ahead.add(tree.w_in + (node + n) * tree.hidden);
        if (outputs) ahead.add(tree.w_out + (node + n) * tree.hidden);
      }
  }

  template <Store kHow>
  void walk_pieces(int64_t lot) const {
    const int begin = (int)(num_pieces * lot / lots), end = (int)(num_pieces * (lot + 1) / lots);
    Tile<X> tile;
    const int stride = PassMemory::stride(tree.levels);
    alignas(64) float hidden[kTile * 32];
    for (int p = begin; p < end; ++p) {
      const Piece& piece = memory.pieces[p];
      fill(tile, piece);
      Ahead ahead;
      if (p + 1 < end) announce(ahead, memory.pieces[p + 1], stop, tree.levels, true);
      descend(tile, tree, piece.node, stop, tree.levels, ahead);
      for (int i = 0; i < tile.size; ++i) activate(call->layer.activation, tile.logits[i], hidden + i * stride, nullptr, stride);
      typename Y::type* rows[kTile];
      for (int i = 0; i < tile.size; ++i) rows[i] = y + tile.token[i] * tree.hidden;
      combine<kHow, X, Y, W>(tile, tree, hidden, stride, rows, ahead);
      if (call->logits) keep(tile);
    }
#if defined(__AVX2__)
    if (kHow == kStream) _mm_sfence();
#endif
  }

  void keep(const Tile<X>& tile) const {
    const int32_t trees = call->layer.trees;
    for (int g = 0; g < tile.num_groups; ++g)
      for (int i = tile.groups[g].begin; i < tile.groups[g].end; ++i) {
        const int64_t token = first + tile.token[tile.order[i]];
        call->leaves[token * trees + tree_index] = tile.groups[g].node;
        memcpy(call->logits + (token * trees + tree_index) * tree.levels, tile.logits[tile.order[i]], tree.levels * sizeof(float));
      }
  }

  template <Store kHow>
  void run(cmm_parallel parallel, int threads) {
    if (stop) parallel((tokens + kChunk - 1) / kChunk, [](void* self, int64_t i) { ((TreePass*)self)->route_chunk(i); }, this);
    bucket();
    lots = num_pieces < threads ? num_pieces : threads;
    parallel(lots, [](void* self, int64_t i) { ((TreePass*)self)->template walk_pieces<kHow>(i); }, this);
  }
};

inline void serial(int64_t tasks, cmm_task task, void* context) {
  for (int64_t i = 0; i < tasks; ++i) task(context, i);
}

}  // namespace CMM_ISA
