// The products of which the depthwise convolution and its gradients are made, on rows that hold one vector of channels
// at every column. Included once per instruction set, after simd.h.
//
// Legend: K kernel side, S stride, A accumulator. Columns count from the padding: the map's first one is K/2.

namespace mf::MF_ISA {

// One input row: where padded column 0 would be, and the step between columns. A row of zeros has step 0.
template <class A>
struct Row {
  const A* at;
  int64_t step;
  MF_INLINE Vector<A> operator[](int64_t column) const { return load(at + column * step); }
};

// Calls emit(r, column, sum) for ROWS neighbouring output rows and COLUMNS neighbouring output columns.
// BORDERED: the padding is not in memory, so columns outside [K/2, K/2 + width) are not read.
template <class A, int K, int S, int ROWS, int COLUMNS, bool BORDERED, class Emit>
MF_INLINE void convolve_block(const Row<A>* rows,       // [K + S*(ROWS-1)]
                              const Vector<A>* weight,  // [K*K]
                              Vector<A> bias, int64_t column, int64_t input_width, const Emit& emit) {
  constexpr int reads = S * (COLUMNS - 1) + K;
  Vector<A> acc[ROWS][COLUMNS];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < COLUMNS; ++i) acc[r][i] = bias;
  }
#pragma GCC unroll 7
  for (int h = 0; h < K + S * (ROWS - 1); ++h) {
    Vector<A> x[reads];
#pragma GCC unroll 11
    for (int i = 0; i < reads; ++i) {
      const int64_t at = column * S + i;
      x[i] = BORDERED && (at < K / 2 || at >= K / 2 + input_width) ? Vector<A>{} : rows[h][at];
    }
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) {
      const int u = h - r * S;
      if (u < 0 || u >= K) continue;
#pragma GCC unroll 5
      for (int v = 0; v < K; ++v) {
#pragma GCC unroll 4
        for (int i = 0; i < COLUMNS; ++i) acc[r][i] += weight[u * K + v] * x[i * S + v];
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < COLUMNS; ++i) emit(r, column + i, acc[r][i]);
  }
}

// Calls emit(r, column, sum) for ROWS output rows of `width` columns. float64 is for checking gradients, not for speed:
// it goes column by column, which halves the code.
template <class A, int K, int S, int ROWS, bool BORDERED, class Emit>
MF_INLINE void convolve_rows(const Row<A>* rows, const Vector<A>* weight, Vector<A> bias, int64_t width,
                             int64_t input_width, const Emit& emit) {
  constexpr int block = sizeof(A) == 4 ? 4 : 1;
  int64_t column = 0;
  if (BORDERED && width >= block) {
    convolve_block<A, K, S, ROWS, block, true>(rows, weight, bias, 0, input_width, emit);
    column = block;
  }
  // blocks whose reads, up to padded column S*(column + block - 1) + K - 1, stay inside the map
  const int64_t inside = BORDERED ? (input_width + K / 2 - K) / S - block + 1 : width - block;
  for (; column <= inside && column + block <= width; column += block) {
    convolve_block<A, K, S, ROWS, block, false>(rows, weight, bias, column, input_width, emit);
  }
  for (; BORDERED && column + block <= width; column += block) {
    convolve_block<A, K, S, ROWS, block, BORDERED>(rows, weight, bias, column, input_width, emit);
  }
  if constexpr (block > 1) {
    switch (width - column) {
      case 3: return convolve_block<A, K, S, ROWS, 3, BORDERED>(rows, weight, bias, column, input_width, emit);
      case 2: return convolve_block<A, K, S, ROWS, 2, BORDERED>(rows, weight, bias, column, input_width, emit);
      case 1: return convolve_block<A, K, S, ROWS, 1, BORDERED>(rows, weight, bias, column, input_width, emit);
    }
  }
}

// d_weight[u][v] += sum_j g[j] x_u[S*j + v], d_bias += sum_j g[j], for one output row
template <class A, int K, int S>
MF_INLINE void add_weight_gradient(Vector<A>* d_weight,  // [K*K]
                                   Vector<A>& d_bias,
                                   const A* g,          // [width][LANES]
                                   const Row<A>* rows,  // [K]
                                   int64_t width) {
  constexpr int lanes = LANES<A>;
  Vector<A> acc[K * K], total = d_bias;
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) acc[t] = d_weight[t];
  for (int64_t j = 0; j < width; ++j) {
    const Vector<A> gradient = load(g + j * lanes);
    total += gradient;
#pragma GCC unroll 5
    for (int u = 0; u < K; ++u) {
#pragma GCC unroll 5
      for (int v = 0; v < K; ++v) acc[u * K + v] += gradient * rows[u][j * S + v];
    }
  }
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) d_weight[t] = acc[t];
  d_bias = total;
}

// d_x[w] = sum over the taps that reach it: output row (h + K/2 - u) / S and column (w + K/2 - v) / S where they divide
template <class A, int K, int S, class Emit>
MF_INLINE void input_gradient_row(const A* const* g_rows,   // [K] by tap u: column 0 of its output row, null where none
                                  const Vector<A>* weight,  // [K*K]
                                  int64_t width, const Emit& emit) {
  constexpr int lanes = LANES<A>, pad = K / 2;
#pragma GCC unroll 2
  for (int phase = 0; phase < S; ++phase) {
    for (int64_t w = phase; w < width; w += S) {
      Vector<A> acc{};
#pragma GCC unroll 5
      for (int u = 0; u < K; ++u) {
        if (g_rows[u] == nullptr) continue;
#pragma GCC unroll 5
        for (int v = 0; v < K; ++v) {
          if ((phase + pad + S * K - v) % S != 0) continue;
          const int shift = (phase + pad + S * K - v) / S - K;
          acc += weight[u * K + v] * load(g_rows[u] + (w / S + shift) * lanes);
        }
      }
      emit(w, acc);
    }
  }
}

}  // namespace mf::MF_ISA
