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

// Working memory of a pass over `tokens` tokens of one tree.
struct PassMemory {
  float* logits;    // [tokens, stride]
  int32_t* order;   // tokens, chunk by chunk as the walk of the top levels leaves them
  Group* runs;      // [chunks, kChunk] of `order`: what stands together at one node of the stop level
  int32_t* num_runs;  // by chunk
  int32_t* sorted;  // all tokens, by node of the stop level
  int32_t* ends;    // by node
  Group* pieces;    // of `sorted`: tiles
  static int stop_level(int64_t tokens, int levels) {
    int stop = 0;
    while (stop + kStepLevels / 2 < levels && (tokens >> (stop + 1)) >= kSubtreeTokens) stop += kStepLevels / 2;
    return stop < 16 ? stop : 16;
  }
  // floats between the logits of two tokens: whole vectors, so that activations need no copy
  static int stride(int levels) { return (int)round_up(levels, 16); }
  template <class Take>
  void lay_out(int64_t tokens, int levels, Take take) {
    const int64_t buckets = (int64_t(1) << stop_level(tokens, levels)) + 1, chunks = (tokens + kChunk - 1) / kChunk;
    logits = (float*)take(tokens * stride(levels) * 4);
    order = (int32_t*)take(tokens * 4);
    sorted = (int32_t*)take(tokens * 4);
    ends = (int32_t*)take(buckets * 4);
    num_runs = (int32_t*)take(chunks * 4);
    runs = (Group*)take(buckets > 2 ? chunks * kChunk * sizeof(Group) : 0);
    pieces = (Group*)take((buckets + tokens / kTile + 1) * sizeof(Group));
  }
  static size_t bytes(int64_t tokens, int levels) {
    return bytes_of([&](auto take) { PassMemory().lay_out(tokens, levels, take); });
  }
  PassMemory() = default;
  PassMemory(void* memory, int64_t tokens, int levels) {
    lay_from(memory, [&](auto take) { lay_out(tokens, levels, take); });
  }
};

// Brings the tokens of all runs together by node, order -> sorted; node least + b ends at ends[b], which is zero at first.
// each(f) calls f for every run.
template <class Each>
void gather(Each each, int32_t least, int32_t buckets, int32_t* ends, const int32_t* order, int32_t* sorted) {
  each([&](const Group& run) { ends[run.node - least] += run.end - run.begin; });
  for (int32_t b = 0, at = 0; b < buckets; ++b) at += ends[b], ends[b] = at - ends[b];
  each([&](const Group& run) {
    int32_t& to = ends[run.node - least];
    for (int i = run.begin; i < run.end; ++i) sorted[to++] = order[i];
  });
}

// Cuts tokens [begin, end) at a node into tiles; how many there are.
inline int cut(int32_t node, int begin, int end, Group* into) {
  int count = 0;
  for (; begin < end; begin += kTile) into[count++] = {node, begin, end - begin < kTile ? end : begin + kTile};
  return count;
}

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

  Tile<X> tile_of(const Group& piece, int32_t* order) const {
    Tile<X> tile;
    tile.x = (const typename X::type*)call->x + first * tree.hidden;
    tile.x_scale = call->x_scale ? call->x_scale + first : nullptr;
    tile.logits = memory.logits;
    tile.hidden = tree.hidden;
    tile.stride = PassMemory::stride(tree.levels);
    tile.order = order + piece.begin;
    tile.size = piece.end - piece.begin;
    return tile;
  }

  // One chunk of tokens down to the stop level: some levels in pieces of one node each, then sorted by node again.
  void route_chunk(int64_t chunk) const {
    const int begin = (int)(chunk * kChunk), end = (int)(begin + kChunk < tokens ? begin + kChunk : tokens);
    for (int i = begin; i < end; ++i) memory.order[i] = i;
    Group* runs = memory.runs + begin;
    Group pieces[kChunk];
    int num_pieces = cut(0, begin, end, pieces), num_runs = 0;
    for (int level = 0; level < stop;) {
      const int next = level + kStepLevels < stop ? level + kStepLevels : stop;
      num_runs = 0;
      for (int p = 0; p < num_pieces; ++p) {
        const Group& piece = pieces[p];
        Tile<X> tile = tile_of(piece, memory.order);
        Ahead ahead;
        if (p + 1 < num_pieces) announce(ahead, tile, pieces[p + 1], memory.order, level, next, false);
        descend(tile, tree, piece.node, level, next, ahead);
        for (int g = 0; g < tile.num_groups; ++g)
          runs[num_runs++] = {tile.groups[g].node, piece.begin + tile.groups[g].begin, piece.begin + tile.groups[g].end};
      }
      if (next < stop) num_pieces = sort_chunk(begin, end, next, runs, num_runs, pieces);
      level = next;
    }
    memory.num_runs[chunk] = num_runs;
  }

  // Sorts a chunk's tokens by node and cuts them into tiles; how many there are.
  int sort_chunk(int begin, int end, int level, const Group* runs, int num_runs, Group* pieces) const {
    const int32_t least = (1 << level) - 1, buckets = 1 << level;
    int num_pieces = 0;
    if (buckets > kChunk) {  // tokens are nearly alone by then
      for (int r = 0; r < num_runs; ++r) num_pieces += cut(runs[r].node, runs[r].begin, runs[r].end, pieces + num_pieces);
      return num_pieces;
    }
    int32_t ends[kChunk], order[kChunk];
    memset(ends, 0, buckets * sizeof *ends);
    auto each = [&](auto f) { for (int r = 0; r < num_runs; ++r) f(runs[r]); };
    gather(each, least, buckets, ends, memory.order, order);
    memcpy(memory.order + begin, order, (end - begin) * sizeof *order);
    for (int b = 0, from = 0; b < buckets; from = ends[b++])
      num_pieces += cut(least + b, begin + from, begin + ends[b], pieces + num_pieces);
    return num_pieces;
  }

  // Sorts all tokens by node and cuts them into tiles.
  void bucket() {
    const int32_t least = (1 << stop) - 1, buckets = 1 << stop;
    int32_t* const ends = memory.ends;
    memset(ends, 0, buckets * sizeof *ends);
    const int64_t chunks = stop ? (tokens + kChunk - 1) / kChunk : 0;
    auto each = [&](auto f) {
      for (int64_t c = 0; c < chunks; ++c)
        for (int r = 0; r < memory.num_runs[c]; ++r) f(memory.runs[c * kChunk + r]);
    };
    gather(each, least, buckets, ends, memory.order, memory.sorted);
    if (stop == 0) {
      for (int64_t i = 0; i < tokens; ++i) memory.sorted[i] = (int32_t)i;
      ends[0] = (int32_t)tokens;
    }
    for (int32_t b = 0, from = 0; b < buckets; from = ends[b++])
      num_pieces += cut(least + b, from, ends[b], memory.pieces + num_pieces);
  }

  // Rows that the walk of a piece from `level` to `end` starts with: its tokens', and those of the top of its subtree.
  void announce(Ahead& ahead, const Tile<X>& tile, const Group& piece, const int32_t* order, int level, int end, bool outputs) const {
    for (int i = piece.begin; i < piece.end; ++i) ahead.add(tile.row(order[i]));
    for (int below = 0; below < kStepLevels && level + below < end; ++below)
      for (int64_t node = ((int64_t)(piece.node + 1) << below) - 1, n = 0; n < 1 << below; ++n) {
        ahead.add(tree.w_in + (node + n) * tree.hidden);
        if (outputs) ahead.add(tree.w_out + (node + n) * tree.hidden);
      }
  }

  template <Store kHow>
  void walk_pieces(int64_t lot) const {
    const int begin = (int)(num_pieces * lot / lots), end = (int)(num_pieces * (lot + 1) / lots);
    alignas(64) float hidden[kTile * 32];
    for (int p = begin; p < end; ++p) {
      Tile<X> tile = tile_of(memory.pieces[p], memory.sorted);
      Ahead ahead;
      if (p + 1 < end) announce(ahead, tile, memory.pieces[p + 1], memory.sorted, stop, tree.levels, true);
      descend(tile, tree, memory.pieces[p].node, stop, tree.levels, ahead);
      for (int i = 0; i < tile.size; ++i)
        activate(call->layer.activation, tile.logits_of(tile.order[i]), hidden + i * tile.stride, nullptr, tile.stride);
      combine<kHow, X, Y, W>(tile, tree, hidden, y, ahead);
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
        const int64_t at = (first + tile.order[i]) * trees + tree_index;
        call->leaves[at] = tile.groups[g].node;
        memcpy(call->logits + at * tree.levels, tile.logits_of(tile.order[i]), tree.levels * sizeof(float));
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
