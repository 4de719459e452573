// The two bridges and the attention among tokens. Scores are a matrix product like any other, with a lane for each
// (head, token) and the queries or keys as weight, zero outside their head. No include guard: once per instruction set.

namespace mf::engine::MF_LEVEL {

constexpr int CHUNK = 112;  // positions whose scores stay in the first-level cache

MF_INLINE void score(const Products& products, const float* x, int count, float* scores) {
  Epilogue e;
  e.width = count;
  e.out = scores;
  pointwise(products, e, x, BLOCK, 0, count, 0, panel_count(products.vectors));
}

// sums[m] += the weights of head `head`, times x, over `count` positions of one block
template <int M>
inline void weigh(const float* x, const float* weights, int head, int count, float* sums) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    V acc[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) acc[m] = load(sums + m * BLOCK + lane);
    for (int p = 0; p < count; ++p) {
      const V value = load(x + ptrdiff_t(p) * BLOCK + lane);
      const float* w = weights + p * BLOCK + head * MAX_TOKENS;
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) acc[m] += value * broadcast(w[m]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(sums + m * BLOCK + lane, acc[m]);
  }
}

// out = x + the values of the heads in [first, last), weighted, over `count` positions of one block
template <int M>
inline void spread(const float* x, const float* weights, const float* values, ptrdiff_t head_values, int first, int last,
                   int count, float* out, uint16_t* half) {
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    for (int h = first; h < last; ++h) {
      V v[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) v[m] = load(values + h * head_values + m * BLOCK + lane);
      const float* from = h == first ? x : out;
      for (int p = 0; p < count; ++p) {
        const ptrdiff_t at = ptrdiff_t(p) * BLOCK + lane;
        const float* w = weights + p * BLOCK + h * MAX_TOKENS;
        V sum = load(from + at);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sum += v[m] * broadcast(w[m]);
        store(out + at, sum);
        if (half && h == last - 1) store_half(half + at, sum);
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

// The heads whose channels a block has: head 0 is channels [0, C / 2)
MF_INLINE void heads_of(int block, int C, int* first, int* last) {
  *first = block * BLOCK < C / 2 ? 0 : 1;
  *last = block * BLOCK + BLOCK > C / 2 ? 2 : 1;
}

inline void mobile_to_former(const Walk& walk, const Products& queries, int C, int M, float* most, float* sum,
                             float* sums, float* scores) {
  const int blocks = (C + BLOCK - 1) / BLOCK;
  const ptrdiff_t head_sums = ptrdiff_t(blocks) * M * BLOCK;
  for (int row = 0; row < walk.rows; ++row) {
    for (int begin = 0; begin < walk.width; begin += CHUNK) {
      const int count = walk.width - begin < CHUNK ? walk.width - begin : CHUNK;
      const float* x = walk.x + row * walk.row + ptrdiff_t(begin) * BLOCK;
      float local[CHUNK * BLOCK];
      float* s = scores ? scores + (ptrdiff_t(row) * walk.width + begin) * BLOCK : local;
      score(queries, x, count, s);
      // softmax so far: what was summed under the old maximum shrinks by the difference to the new one
      float shrink[BLOCK];
      bool grew = false;
      for (int lane = 0; lane < BLOCK; lane += LANES) {
        V top = load(most + lane);
        const V old = top;
        for (int p = 0; p < count; ++p) top = maximum(load(s + p * BLOCK + lane), top);
        const V factor = exp2_nonpositive(old - top);
        V total = load(sum + lane) * factor;
        for (int p = 0; p < count; ++p) {
          const V weight = exp2_nonpositive(load(s + p * BLOCK + lane) - top);
          total += weight;
          store(local + p * BLOCK + lane, weight);
        }
        store(most + lane, top);
        store(sum + lane, total);
        store(shrink + lane, factor);
        for (int i = 0; i < LANES; ++i) grew |= factor[i] != 1.0f;
      }
      for (int block = 0; block < blocks; ++block) {
        int first, last;
        heads_of(block, C, &first, &last);
        for (int h = first; h < last; ++h) {
          float* to = sums + h * head_sums + ptrdiff_t(block) * M * BLOCK;
          if (grew) {
            for (int m = 0; m < M; ++m) {
              for (int i = 0; i < BLOCK; ++i) to[m * BLOCK + i] *= shrink[h * MAX_TOKENS + m];
            }
          }
          with_tokens(M, [&]<int TOKENS>() { weigh<TOKENS>(x + block * walk.block, local, h, count, to); });
        }
      }
    }
  }
}

#if defined(MF_LEVEL_AVX512)
template <bool LARGEST>
MF_INLINE V join(V a, V b) {
  return LARGEST ? maximum(a, b) : a + b;
}

// Every lane learns the largest, or the sum, of the eight lanes of its half
template <bool LARGEST>
MF_INLINE V across_eight(V v) {
#if defined(__clang__)
#define MF_SWAP(v, ...) __builtin_shufflevector(v, v, __VA_ARGS__)
#else
#define MF_SWAP(v, ...) __builtin_shuffle(v, VI{__VA_ARGS__})
#endif
  v = join<LARGEST>(v, MF_SWAP(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  v = join<LARGEST>(v, MF_SWAP(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return join<LARGEST>(v, MF_SWAP(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
#undef MF_SWAP
}

// Softmax over the tokens of each head, position by position; a vector holds both heads
MF_INLINE void softmax_chunk(float* scores, int count, int M) {
  V unused{};  // -3e38 in the lanes that have no token
  for (int lane = 0; lane < LANES; ++lane) unused[lane] = lane % MAX_TOKENS < M ? 0.0f : -3.0e38f;
  for (int p = 0; p < count; ++p) {
    const V s = load(scores + p * BLOCK) + unused;
    const V power = exp2_nonpositive(s - across_eight<true>(s));
    store(scores + p * BLOCK, power / across_eight<false>(power));
  }
}
#else
// Softmax over the tokens of each head. Lanes become positions: rows of `square` are (head, token), its columns LANES positions
MF_INLINE void softmax_chunk(float* scores, int count, int M) {
  for (int begin = 0; begin < count; begin += LANES) {
    const int here = count - begin < LANES ? count - begin : LANES;
    float square[BLOCK][LANES] = {};
    for (int p = 0; p < here; ++p) {
      for (int i = 0; i < BLOCK; ++i) square[i][p] = scores[(begin + p) * BLOCK + i];
    }
    for (int h = 0; h < BRIDGE_HEADS; ++h) {
      float(*rows)[LANES] = square + h * MAX_TOKENS;
      V top = load(rows[0]), total = {};
      for (int m = 1; m < M; ++m) top = maximum(load(rows[m]), top);
      for (int m = 0; m < M; ++m) {
        const V power = exp2_nonpositive(load(rows[m]) - top);
        total += power;
        store(rows[m], power);
      }
      for (int m = 0; m < M; ++m) store(rows[m], load(rows[m]) / total);
    }
    for (int p = 0; p < here; ++p) {
      for (int i = 0; i < BLOCK; ++i) scores[(begin + p) * BLOCK + i] = square[i][p];
    }
  }
}
#endif

inline void former_to_mobile(const Walk& walk, const Products& keys, const float* values, int C, int M, float* out,
                             uint16_t* half, ptrdiff_t half_block) {
  const int blocks = (C + BLOCK - 1) / BLOCK;
  const ptrdiff_t head_values = ptrdiff_t(blocks) * M * BLOCK;
  for (int row = 0; row < walk.rows; ++row) {
    for (int begin = 0; begin < walk.width; begin += CHUNK) {
      const int count = walk.width - begin < CHUNK ? walk.width - begin : CHUNK;
      const ptrdiff_t at = row * walk.row + ptrdiff_t(begin) * BLOCK;
      float scores[CHUNK * BLOCK];
      score(keys, walk.x + at, count, scores);
      softmax_chunk(scores, count, M);
      uint16_t* to = half ? half + (ptrdiff_t(row) * walk.width + begin) * BLOCK : nullptr;
      for (int block = 0; block < blocks; ++block) {
        int first, last;
        heads_of(block, C, &first, &last);
        with_tokens(M, [&]<int TOKENS>() {
          spread<TOKENS>(walk.x + at + block * walk.block, scores, values + ptrdiff_t(block) * M * BLOCK, head_values,
                         first, last, count, out + at + block * walk.block, to ? to + block * half_block : nullptr);
        });
      }
    }
  }
}

}  // namespace mf::engine::MF_LEVEL
