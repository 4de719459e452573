// Products of a map's positions with a few queries, positions as lanes: what both bridges begin with. No include guard:
// once per instruction set.

namespace mf::engine::MF_ISA {

constexpr int CHUNK = 112;  // positions; a multiple of every vector
constexpr float LOWEST = -3.0e38f;

// Of every head and token, over the positions of a chunk
struct Scores {
  float of[BRIDGE_HEADS][MAX_TOKENS][CHUNK];
};

// scores[m] of one head, at VECTORS vectors of positions: what is there, plus channels [first, last) of `turned`
// [channel][CHUNK] times q [channel][8]. An input, once broadcast, serves all the vectors.
template <int M, int VECTORS>
MF_INLINE void accumulate(const float* turned, const float* q, int first, int last, bool fresh, float* scores) {
  V sums[M][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) sums[m][v] = fresh ? V{} : load(scores + m * CHUNK + v * LANES);
  }
  for (int c = first; c < last; ++c) {
    V x[VECTORS];
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) x[v] = load(turned + c * CHUNK + v * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const V query = broadcast(q[c * MAX_TOKENS + m]);
#pragma GCC unroll 3
      for (int v = 0; v < VECTORS; ++v) sums[m][v] += x[v] * query;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 3
    for (int v = 0; v < VECTORS; ++v) store(scores + m * CHUNK + v * LANES, sums[m][v]);
  }
}

// scores[h][m] = sum over the channels of head h of x times q [C][8], for `count` positions and what fills up the last
// vector, where they are those of zeros
template <int M>
inline void score(const float* x, ptrdiff_t block, int C, int count, const float* q, Scores& scores) {
  const int vectors = (count + LANES - 1) / LANES, split = C / BRIDGE_HEADS;
  for (int c = 0; c < C; c += BLOCK) {
    float turned[BLOCK * CHUNK];  // lanes are positions
    for (int v = 0; v < vectors; ++v) {
      for (int lane = 0; lane < BLOCK; lane += LANES) {
        const float* from = x + c / BLOCK * block + ptrdiff_t(v) * LANES * BLOCK + lane;
        const int here = count - v * LANES;
        V square[LANES];
        if (here >= LANES) {
#pragma GCC unroll 16
          for (int p = 0; p < LANES; ++p) square[p] = load(from + p * BLOCK);
        } else {
          for (int p = 0; p < LANES; ++p) square[p] = p < here ? load(from + p * BLOCK) : V{};
        }
        transpose(square);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) store(turned + (lane + i) * CHUNK + v * LANES, square[i]);
      }
    }
    const int end = C - c < BLOCK ? C - c : BLOCK;
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      const int first = h == 0 ? 0 : split - c, last = h == 0 ? split - c : end;
      const int from = first < 0 ? 0 : first, until = last > end ? end : last;
      if (from >= until) continue;
      const bool fresh = c + from == (h == 0 ? 0 : split);
      int v = 0;
      for (; v + 3 <= vectors; v += 3) {
        accumulate<M, 3>(turned + v * LANES, q + c * MAX_TOKENS, from, until, fresh, scores.of[h][0] + v * LANES);
      }
      if (v + 2 == vectors) {
        accumulate<M, 2>(turned + v * LANES, q + c * MAX_TOKENS, from, until, fresh, scores.of[h][0] + v * LANES);
      } else if (v + 1 == vectors) {
        accumulate<M, 1>(turned + v * LANES, q + c * MAX_TOKENS, from, until, fresh, scores.of[h][0] + v * LANES);
      }
    }
  }
}

}  // namespace mf::engine::MF_ISA
