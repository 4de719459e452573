// The two bridges. Positions are taken a chunk at a time: their scores, with a lane for each position, stay in the
// first-level cache, first as they are, then as weights of the softmax. No include guard: once per instruction set.

namespace mf::engine::MF_LEVEL {

constexpr int CHUNK = 112;  // positions; a multiple of every vector
constexpr float LOWEST = -3.0e38f;

// Of every head and token, over the positions of a chunk
struct Scores {
  float of[BRIDGE_HEADS][MAX_TOKENS][CHUNK];
};

template <int HALF, size_t... LANE>
MF_INLINE V interleave(V a, V b, std::index_sequence<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, int(HALF * LANES / 2 + LANE / 2 + (LANE % 2) * LANES)...);
#else
  return __builtin_shuffle(a, b, VI{int(HALF * LANES / 2 + LANE / 2 + (LANE % 2) * LANES)...});
#endif
}

// A square of LANES x LANES, by log2(LANES) perfect shuffles
MF_INLINE void transpose(V (&rows)[LANES]) {
#pragma GCC unroll 4
  for (int round = 1; round < LANES; round *= 2) {
    V mixed[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + LANES / 2], std::make_index_sequence<LANES>{});
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + LANES / 2], std::make_index_sequence<LANES>{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) rows[i] = mixed[i];
  }
}

// scores[h][m] = sum over the channels of head h of x times q [C][8], for `count` positions
template <int M>
inline void score(const float* x, ptrdiff_t block, int C, int count, const float* q, Scores& scores) {
  for (int begin = 0; begin < count; begin += LANES) {
    // the last vector overlaps the one before it, where there is one
    const int first = begin + LANES <= count || count < LANES ? begin : count - LANES;
    const int here = count < LANES ? count : LANES;
    V sums[BRIDGE_HEADS][M] = {};
    for (int c = 0; c < C; c += LANES) {
      const float* from = x + c / BLOCK * block + ptrdiff_t(first) * BLOCK + c % BLOCK;
      V channels[LANES];
      if (here == LANES) {
#pragma GCC unroll 16
        for (int p = 0; p < LANES; ++p) channels[p] = load(from + p * BLOCK);
      } else {
        for (int p = 0; p < LANES; ++p) channels[p] = p < here ? load(from + p * BLOCK) : V{};
      }
      transpose(channels);
      const float* query = q + ptrdiff_t(c) * MAX_TOKENS;
      if (c + LANES <= C / 2 || (c >= C / 2 && c + LANES <= C)) {  // of one head
        V(&to)[M] = sums[c >= C / 2];
        V acc[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) acc[m] = to[m];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; ++i) {
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) acc[m] += channels[i] * broadcast(query[i * MAX_TOKENS + m]);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) to[m] = acc[m];
      } else {
        for (int i = 0; i < LANES && c + i < C; ++i) {
          V(&to)[M] = sums[c + i >= C / 2];
          for (int m = 0; m < M; ++m) to[m] += channels[i] * broadcast(query[i * MAX_TOKENS + m]);
        }
      }
    }
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      for (int m = 0; m < M; ++m) store(scores.of[h][m] + first, sums[h][m]);
    }
  }
}

// sums [M][16] += the weights of one head, times x, over `count` positions of one block
template <int M>
inline void weigh(const float* x, const float (&weights)[MAX_TOKENS][CHUNK], int count, float* sums) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V even[M], odd[M] = {};  // of positions: one set of few sums would wait for itself
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) even[m] = load(sums + m * BLOCK + lane);
    int p = 0;
    for (; p + 2 <= count; p += 2) {
      const V first = load(x + ptrdiff_t(p) * BLOCK + lane), second = load(x + ptrdiff_t(p + 1) * BLOCK + lane);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        even[m] += first * broadcast(weights[m][p]);
        odd[m] += second * broadcast(weights[m][p + 1]);
      }
    }
    if (p < count) {
      const V last = load(x + ptrdiff_t(p) * BLOCK + lane);
      for (int m = 0; m < M; ++m) even[m] += last * broadcast(weights[m][p]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(sums + m * BLOCK + lane, even[m] + odd[m]);
  }
}

// out = x + the values [M][16] of one head, weighted, over `count` positions of one block
template <int M>
inline void spread(const float* x, const float (&weights)[MAX_TOKENS][CHUNK], const float* values, int count, float* out,
                   uint16_t* half) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V v[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) v[m] = load(values + m * BLOCK + lane);
    for (int p = 0; p < count; ++p) {
      const ptrdiff_t at = ptrdiff_t(p) * BLOCK + lane;
      V sum = load(x + at);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) sum += v[m] * broadcast(weights[m][p]);
      store(out + at, sum);
      if (half) store_half(half + at, sum);
    }
  }
}

// The heads whose channels a block has: head 0 is channels [0, C / 2)
MF_INLINE void heads_of(int block, int C, int* first, int* last) {
  *first = block * BLOCK < C / 2 ? 0 : 1;
  *last = block * BLOCK + BLOCK > C / 2 ? 2 : 1;
}

MF_INLINE float largest(V v) {
  float most = v[0];
  for (int lane = 1; lane < LANES; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
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
inline void mobile_to_former_of(const Walk& walk, const float* q, int C, float* most, float* sum, float* sums,
                                float* kept) {
  const int blocks = (C + BLOCK - 1) / BLOCK;
  const ptrdiff_t head_sums = ptrdiff_t(blocks) * M * BLOCK;
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
          for (int i = 0; i < BRIDGE_HEADS * M; ++i) to[p * BLOCK + i / M * MAX_TOKENS + i % M] = scores.of[i / M][i % M][p];
        }
      }
      float factors[BRIDGE_HEADS][M];
      const bool moved = softmax.add(scores, count, factors);
      for (int block = 0; block < blocks; ++block) {
        int first, last;
        heads_of(block, C, &first, &last);
        for (int h = first; h < last; ++h) {
          float* to = sums + h * head_sums + ptrdiff_t(block) * M * BLOCK;
          if (moved) {
            for (int m = 0; m < M; ++m) {
              for (int lane = 0; lane < BLOCK; lane += LANES) {
                store(to + m * BLOCK + lane, load(to + m * BLOCK + lane) * factors[h][m]);
              }
            }
          }
          weigh<M>(x + block * walk.block, scores.of[h], count, to);
        }
      }
    }
  }
  for (int i = 0; softmax.started && i < BRIDGE_HEADS * M; ++i) {
    most[i / M * MAX_TOKENS + i % M] = softmax.reference[i / M][i % M];
    sum[i / M * MAX_TOKENS + i % M] = sum_lanes(softmax.sums[i / M][i % M]);
  }
}

template <int M>
inline void former_to_mobile_of(const Walk& walk, const float* k, const float* values, int C, float* out, uint16_t* half,
                                ptrdiff_t half_block) {
  const int blocks = (C + BLOCK - 1) / BLOCK;
  const ptrdiff_t head_values = ptrdiff_t(blocks) * M * BLOCK;
  Scores scores = {};
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
      uint16_t* halves = half ? half + (ptrdiff_t(row) * walk.width + begin) * BLOCK : nullptr;
      for (int block = 0; block < blocks; ++block) {
        int first, last;
        heads_of(block, C, &first, &last);
        float* to = out + at + block * walk.block;
        for (int h = first; h < last; ++h) {
          spread<M>(h == first ? walk.x + at + block * walk.block : to, scores.of[h],
                    values + h * head_values + ptrdiff_t(block) * M * BLOCK, count, to,
                    halves && h == last - 1 ? halves + block * half_block : nullptr);
        }
      }
    }
  }
}

template <class F>
MF_INLINE void with_tokens(int M, F f) {
  switch (M) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

inline void mobile_to_former(const Walk& walk, const float* q, int C, int M, float* most, float* sum, float* sums,
                             float* kept) {
  with_tokens(M, [&]<int TOKENS>() { mobile_to_former_of<TOKENS>(walk, q, C, most, sum, sums, kept); });
}

inline void former_to_mobile(const Walk& walk, const float* k, const float* values, int C, int M, float* out,
                             uint16_t* half, ptrdiff_t half_block) {
  with_tokens(M, [&]<int TOKENS>() { former_to_mobile_of<TOKENS>(walk, k, values, C, out, half, half_block); });
}

}  // namespace mf::engine::MF_LEVEL
