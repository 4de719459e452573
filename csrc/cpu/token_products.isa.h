// The three products between M token rows and a tile of positions, of which both attentions and their gradients are
// made. Included once per instruction set, after common/tokens.isa.h.
//
// Legend: M tokens (compile time, 1 to 8), E head width, P positions (a multiple of the lanes), tiles [E][P].

namespace mf::MF_ISA {

// How many independent accumulators fit the registers beside their operands
constexpr int ACCUMULATORS = MF_ISA_REGISTERS == 32 ? 24 : 12;
template <int M>
constexpr int BLOCK = ACCUMULATORS / M > 4   ? 4
                      : ACCUMULATORS / M < 1 ? 1
                                             : ACCUMULATORS / M;

// Right-hand rows of a product whose sums are few: as many as fill the vectors that sum_each reduces together
template <int M>
constexpr int SUMS_BLOCK = M == 1   ? (MF_ISA_REGISTERS == 32 ? 16 : 8)
                           : M == 2 ? (MF_ISA_REGISTERS == 32 ? 8 : 4)
                                    : BLOCK<M>;

template <class A, int M, int VECTORS>
MF_INLINE void rows_dot_tile_block(A* scores, const A* rows, const A* tile, int64_t E, int64_t P) {
  constexpr int lanes = LANES<A>;
  Vector<A> acc[M][VECTORS] = {};
  for (int64_t c = 0; c < E; ++c) {
    Vector<A> x[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) x[i] = load(tile + c * P + i * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<A> row = broadcast(rows[m * E + c]);
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) acc[m][i] += row * x[i];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) store(scores + m * P + i * lanes, acc[m][i]);
  }
}

// scores[m][p] = sum_c rows[m][c] tile[c][p]
template <class A, int M>
void rows_dot_tile(A* scores,      // [M][P]
                   const A* rows,  // [M][E]
                   const A* tile,  // [E][P]
                   int64_t E, int64_t P, int64_t used) {
  constexpr int lanes = LANES<A>, block = BLOCK<M>;
  int64_t p = 0;
  for (; p + block * lanes <= used; p += block * lanes) {
    rows_dot_tile_block<A, M, block>(scores + p, rows, tile + p, E, P);
  }
  for (; p < used; p += lanes) rows_dot_tile_block<A, M, 1>(scores + p, rows, tile + p, E, P);
}

template <class A, int M, int VECTORS>
MF_INLINE void add_rows_block(A* tile, const A* weights, const A* rows, int64_t E, int64_t P) {
  constexpr int lanes = LANES<A>;
  Vector<A> weight[M][VECTORS];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) weight[m][i] = load(weights + m * P + i * lanes);
  }
  for (int64_t c = 0; c < E; ++c) {
    Vector<A> y[VECTORS];
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) y[i] = load(tile + c * P + i * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<A> row = broadcast(rows[m * E + c]);
#pragma GCC unroll 4
      for (int i = 0; i < VECTORS; ++i) y[i] += weight[m][i] * row;
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) store(tile + c * P + i * lanes, y[i]);
  }
}

// tile[c][p] += sum_m weights[m][p] rows[m][c]
template <class A, int M>
void add_rows(A* tile,           // [E][P]
              const A* weights,  // [M][P]
              const A* rows,     // [M][E]
              int64_t E, int64_t P, int64_t used) {
  constexpr int lanes = LANES<A>, block = BLOCK<M>;
  int64_t p = 0;
  for (; p + block * lanes <= used; p += block * lanes) add_rows_block<A, M, block>(tile + p, weights + p, rows, E, P);
  for (; p < used; p += lanes) add_rows_block<A, M, 1>(tile + p, weights + p, rows, E, P);
}

// sums[m][c] += sum_p left[m][p] right[c][p] for p < used, a multiple of the lanes.
// AHEAD: `right` goes on in memory where the next call will read; fetch that into the second-level cache meanwhile
// (it has more misses under way at once than the first: 1.4 times the bandwidth from memory, measured).
template <class A, int M, int CHANNELS, bool AHEAD = false>
MF_INLINE void add_rows_dots(A* sums,         // [M][sums_stride]
                             const A* left,   // [M][left_stride]
                             const A* right,  // [CHANNELS][right_stride]
                             int64_t sums_stride, int64_t left_stride, int64_t right_stride, int64_t used) {
  constexpr int lanes = LANES<A>;
  constexpr int count = M * CHANNELS, padded = (count + lanes - 1) / lanes * lanes;
  Vector<A> acc[padded] = {};
  for (int64_t p = 0; p < used; p += lanes) {
    Vector<A> x[CHANNELS];
#pragma GCC unroll 16
    for (int c = 0; c < CHANNELS; ++c) {
      x[c] = load(right + c * right_stride + p);
      if constexpr (AHEAD) __builtin_prefetch(right + (c + 2 * CHANNELS) * right_stride + p, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vector<A> weight = load(left + m * left_stride + p);
#pragma GCC unroll 16
      for (int c = 0; c < CHANNELS; ++c) acc[m * CHANNELS + c] += weight * x[c];
    }
  }
  A totals[padded];
#pragma GCC unroll 4
  for (int i = 0; i < padded; i += lanes) {
    Vector<A> group[lanes];
#pragma GCC unroll 16
    for (int j = 0; j < lanes; ++j) group[j] = acc[i + j];
    store(totals + i, sum_each(group));
  }
  for (int m = 0; m < M; ++m) {
    for (int c = 0; c < CHANNELS; ++c) sums[m * sums_stride + c] += totals[m * CHANNELS + c];
  }
}

// sums[m][c] += sum_p weights[m][p] tile[c][p]
template <class A, int M>
void add_tile_dots(A* sums,           // [M][E]
                   const A* weights,  // [M][P]
                   const A* tile,     // [E][P]
                   int64_t E, int64_t P, int64_t used) {
  constexpr int block = BLOCK<M>;
  int64_t c = 0;
  for (; c + block <= E; c += block) add_rows_dots<A, M, block>(sums + c, weights, tile + c * P, E, P, P, used);
  for (; c < E; ++c) add_rows_dots<A, M, 1>(sums + c, weights, tile + c * P, E, P, P, used);
}

}  // namespace mf::MF_ISA
