// The two bridges. Positions are taken a chunk at a time: their scores, with a lane for each position, stay in the
// first-level cache, first as they are, then as weights of the softmax. No include guard: once per instruction set.

namespace mf::engine::MF_ISA {

using Weights = float[MAX_TOKENS][CHUNK];  // of one head

// Lanes of the first head from `own`, the others from `other`: a block may have channels of both heads
MF_INLINE V blend(float own, float other, VI first_head) { return first_head ? broadcast(own) : broadcast(other); }

// sums [block][M][16] += the weights of one head, times x, over `count` positions of so many blocks
template <int M, int BLOCKS>
MF_INLINE void weigh(const float* x, ptrdiff_t block, const Weights& weights, int count, float* sums) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V acc[BLOCKS][M];
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[b][m] = load(sums + (b * M + m) * BLOCK + lane);
    }
    for (int p = 0; p < count; ++p) {
      V value[BLOCKS];
#pragma GCC unroll 3
      for (int b = 0; b < BLOCKS; ++b) value[b] = load(x + b * block + ptrdiff_t(p) * BLOCK + lane);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V weight = broadcast(weights[m][p]);
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) acc[b][m] += value[b] * weight;
      }
    }
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) store(sums + (b * M + m) * BLOCK + lane, acc[b][m]);
    }
  }
}

// The same for a block with channels of both heads, `own` of them of the first
template <int M>
MF_INLINE void weigh_both(const float* x, const Scores& weights, int own, int count, float* sums) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    VI first_head;
    for (int i = 0; i < LANES; ++i) first_head[i] = lane + i < own ? -1 : 0;
    V acc[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] = load(sums + m * BLOCK + lane);
    for (int p = 0; p < count; ++p) {
      const V value = load(x + ptrdiff_t(p) * BLOCK + lane);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m] += value * blend(weights.of[0][m][p], weights.of[1][m][p], first_head);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(sums + m * BLOCK + lane, acc[m]);
  }
}

// out = x + the values [block][M][16], weighted, over `count` positions of so many blocks of one head
template <int M, int BLOCKS>
MF_INLINE void spread(const float* x, ptrdiff_t block, const Weights& weights, const float* values, int count,
                      float* out, const Bfloat16Map& bf16, int bf16_block, int position) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V v[BLOCKS][M];
#pragma GCC unroll 3
    for (int b = 0; b < BLOCKS; ++b) {
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) v[b][m] = load(values + (b * M + m) * BLOCK + lane);
    }
    for (int p = 0; p < count; ++p) {
      const ptrdiff_t at = ptrdiff_t(p) * BLOCK + lane;
      V sum[BLOCKS];
#pragma GCC unroll 3
      for (int b = 0; b < BLOCKS; ++b) sum[b] = load(x + b * block + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const V weight = broadcast(weights[m][p]);
#pragma GCC unroll 3
        for (int b = 0; b < BLOCKS; ++b) sum[b] += v[b][m] * weight;
      }
#pragma GCC unroll 3
      for (int b = 0; b < BLOCKS; ++b) {
        store(out + b * block + at, sum[b]);
        if (bf16.data) store_bf16(bf16, bf16_at(bf16, bf16_block + b, position + p) + lane, sum[b]);
      }
    }
  }
}

template <int M>
MF_INLINE void spread_both(const float* x, const Scores& weights, int own, const float* values, int count, float* out,
                           const Bfloat16Map& bf16, int bf16_block, int position) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    VI first_head;
    for (int i = 0; i < LANES; ++i) first_head[i] = lane + i < own ? -1 : 0;
    V v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = load(values + m * BLOCK + lane);
    for (int p = 0; p < count; ++p) {
      const ptrdiff_t at = ptrdiff_t(p) * BLOCK + lane;
      V sum = load(x + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum += v[m] * blend(weights.of[0][m][p], weights.of[1][m][p], first_head);
      store(out + at, sum);
      if (bf16.data) store_bf16(bf16, bf16_at(bf16, bf16_block, position + p) + lane, sum);
    }
  }
}

// Calls alone(block, count, head) for blocks of one head, two at a time where there are, and both(block, own) for the
// one that has channels of both
template <class Alone, class Both>
MF_INLINE void by_heads(int C, Alone alone, Both both) {
  const int blocks = (C + BLOCK - 1) / BLOCK, split = C / BRIDGE_HEADS;
  for (int b = 0; b < blocks;) {
    const int own = split - b * BLOCK;  // channels of the first head from here on
    if (own > 0 && own < BLOCK) {
      both(b, own);
      ++b;
    } else {
      const int until = own > 0 ? own / BLOCK + b : blocks;
      const int count = until - b >= 2 ? 2 : 1;
      alone(b, count, own > 0 ? 0 : 1);
      b += count;
    }
  }
}

// A softmax over positions of which only some are known yet, for every head and token. Its weights are 2^(score -
// reference), and any reference will do that is not far below the largest score: it moves only when it has to.
template <int M>
struct Softmax {
  static constexpr float FAR = 24.0f;  // sums of 2^24 keep all their digits, and are far from overflow

  float reference[BRIDGE_HEADS][M];
  V sums[BRIDGE_HEADS][M] = {};
  bool started = false;

  // Scores become weights. Returns whether references moved, by factors that earlier sums have to be multiplied with.
  MF_INLINE bool add(Scores& scores, int count, float (&factors)[BRIDGE_HEADS][M]) {
    const int padded = (count + LANES - 1) / LANES * LANES;
    V over = broadcast(LOWEST);
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      for (int m = 0; m < M; ++m) {
        float* s = scores.of[h][m];
        for (int p = count; p < padded; ++p) s[p] = LOWEST;
        if (!started) continue;
        for (int p = 0; p < padded; p += LANES) over = maximum(load(s + p) - reference[h][m], over);
      }
    }
    const bool move = !started || largest(over) > FAR;
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      for (int m = 0; m < M; ++m) {
        float* s = scores.of[h][m];
        if (move) {
          V tops = broadcast(started ? reference[h][m] : LOWEST);
          for (int p = 0; p < padded; p += LANES) tops = maximum(load(s + p), tops);
          const float top = largest(tops);
          factors[h][m] = started ? exp2(broadcast(reference[h][m] - top))[0] : 1.0f;
          reference[h][m] = top;
          sums[h][m] *= factors[h][m];
        }
        for (int p = 0; p < padded; p += LANES) {
          const V weight = exp2(load(s + p) - reference[h][m]);
          sums[h][m] += weight;
          store(s + p, weight);
        }
      }
    }
    const bool moved = started && move;
    started = true;
    return moved;
  }
};

template <int M>
inline void mobile_to_former_of(const Walk& walk, const float* q, int C, float* reference, float* sum, float* sums,
                                float* kept) {
  Scores scores;
  Softmax<M> softmax;
  for (int row = 0; row < walk.rows; ++row) {
    for (int begin = 0; begin < walk.width; begin += CHUNK) {
      const int count = walk.width - begin < CHUNK ? walk.width - begin : CHUNK;
      const float* x = walk.x + row * walk.row + ptrdiff_t(begin) * BLOCK;
      score<M>(x, walk.block, C, count, q, scores);
      if (kept) {
        float* to = kept + (ptrdiff_t(row) * walk.width + begin) * BLOCK;
        for (int p = 0; p < count; ++p) {
          for (int i = 0; i < BRIDGE_HEADS * M; ++i)
            to[p * BLOCK + i / M * MAX_TOKENS + i % M] = scores.of[i / M][i % M][p];
        }
      }
      float factors[BRIDGE_HEADS][M];
      const bool moved = softmax.add(scores, count, factors);
      if (moved) {
        for (int c = 0; c < C; ++c) {
          for (int m = 0; m < M; ++m)
            sums[(c / BLOCK * M + m) * BLOCK + c % BLOCK] *= factors[c >= C / BRIDGE_HEADS][m];
        }
      }
      by_heads(
          C,
          [&](int b, int blocks, int head) {
            const float* from = x + b * walk.block;
            float* to = sums + ptrdiff_t(b) * M * BLOCK;
            blocks == 2 ? weigh<M, 2>(from, walk.block, scores.of[head], count, to)
                        : weigh<M, 1>(from, walk.block, scores.of[head], count, to);
          },
          [&](int b, int own) {
            weigh_both<M>(x + b * walk.block, scores, own, count, sums + ptrdiff_t(b) * M * BLOCK);
          });
    }
  }
  for (int i = 0; softmax.started && i < BRIDGE_HEADS * M; ++i) {
    reference[i / M * MAX_TOKENS + i % M] = softmax.reference[i / M][i % M];
    sum[i / M * MAX_TOKENS + i % M] = sum_lanes(softmax.sums[i / M][i % M]);
  }
}

template <int M>
inline void former_to_mobile_of(const Walk& walk, const float* k, const float* values, int C, float* out,
                                const Bfloat16Map& bf16) {
  Scores scores;
  for (int row = 0; row < walk.rows; ++row) {
    for (int begin = 0; begin < walk.width; begin += CHUNK) {
      const int count = walk.width - begin < CHUNK ? walk.width - begin : CHUNK;
      const ptrdiff_t at = row * walk.row + ptrdiff_t(begin) * BLOCK;
      score<M>(walk.x + at, walk.block, C, count, k, scores);
      for (auto& head : scores.of) {
        for (int p = 0; p < count; p += LANES) {
          V top = load(head[0] + p), total{}, power[M];
#pragma GCC unroll 8
          for (int m = 1; m < M; ++m) top = maximum(load(head[m] + p), top);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) total += power[m] = exp2(load(head[m] + p) - top);
          const V inverse = 1.0f / total;
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) store(head[m] + p, power[m] * inverse);
        }
      }
      const int position = row * walk.width + begin;
      by_heads(
          C,
          [&](int b, int blocks, int head) {
            const ptrdiff_t from = at + b * walk.block;
            const float* v = values + ptrdiff_t(b) * M * BLOCK;
            blocks == 2
                ? spread<M, 2>(walk.x + from, walk.block, scores.of[head], v, count, out + from, bf16, b, position)
                : spread<M, 1>(walk.x + from, walk.block, scores.of[head], v, count, out + from, bf16, b, position);
          },
          [&](int b, int own) {
            const ptrdiff_t from = at + b * walk.block;
            spread_both<M>(walk.x + from, scores, own, values + ptrdiff_t(b) * M * BLOCK, count, out + from, bf16, b,
                           position);
          });
    }
  }
}

inline void mobile_to_former(const Walk& walk, const float* q, int C, int M, float* reference, float* sum, float* sums,
                             float* kept) {
  with_tokens(M, [&]<int TOKENS>() { mobile_to_former_of<TOKENS>(walk, q, C, reference, sum, sums, kept); });
}

inline void former_to_mobile(const Walk& walk, const float* k, const float* values, int C, int M, float* out,
                             const Bfloat16Map& bf16) {
  with_tokens(M, [&]<int TOKENS>() { former_to_mobile_of<TOKENS>(walk, k, values, C, out, bf16); });
}

}  // namespace mf::engine::MF_ISA
