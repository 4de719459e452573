// The products of which the depthwise convolution and its gradients are made, on rows that hold one vector of channels
// at every column. Included once per instruction set, after simd.h.
//
// Legend: K kernel side, S stride, A accumulator. A row is [columns][LANES] with K/2 zero columns before the first.

namespace mf::MF_ISA {

// sums[r][i] for ROWS neighbouring output rows and COLUMNS neighbouring output columns from `column` on
template <class A, int K, int S, int ROWS, int COLUMNS, class Emit>
MF_INLINE void convolve_block(const A* const* rows,      // [K + S*(ROWS-1)], first padded column of each input row
                              const Vector<A>* weight,   // [K*K]
                              Vector<A> bias, int64_t column, const Emit& emit) {
  constexpr int lanes = LANES<A>, reads = S * (COLUMNS - 1) + K;
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
    for (int i = 0; i < reads; ++i) x[i] = load(rows[h] + (column * S + i) * lanes);
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

// Calls emit(r, column, sum) for ROWS output rows of `width` columns
template <class A, int K, int S, int ROWS, class Emit>
MF_INLINE void convolve_rows(const A* const* rows, const Vector<A>* weight, Vector<A> bias, int64_t width, const Emit& emit) {
  int64_t column = 0;
  for (; column + 4 <= width; column += 4) convolve_block<A, K, S, ROWS, 4>(rows, weight, bias, column, emit);
  switch (width - column) {
    case 3: return convolve_block<A, K, S, ROWS, 3>(rows, weight, bias, column, emit);
    case 2: return convolve_block<A, K, S, ROWS, 2>(rows, weight, bias, column, emit);
    case 1: return convolve_block<A, K, S, ROWS, 1>(rows, weight, bias, column, emit);
  }
}

// d_weight[u][v] += sum_j g[j] x_u[S*j + v], d_bias += sum_j g[j], for one output row
template <class A, int K, int S>
MF_INLINE void add_weight_gradient(Vector<A>* d_weight,      // [K*K]
                                   Vector<A>& d_bias,
                                   const A* g,               // [width][LANES]
                                   const A* const* rows,     // [K], first padded column of each input row
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
      for (int v = 0; v < K; ++v) acc[u * K + v] += gradient * load(rows[u] + (j * S + v) * lanes);
    }
  }
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) d_weight[t] = acc[t];
  d_bias = total;
}

// d_x[w] = sum over the taps that reach it: output row (h + K/2 - u) / S and column (w + K/2 - v) / S where they divide
template <class A, int K, int S, class Emit>
MF_INLINE void input_gradient_row(const A* const* g_rows,    // [K] by tap u: column 0 of its output row, null where none
                                  const Vector<A>* weight,   // [K*K]
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
