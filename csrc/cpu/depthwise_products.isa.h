// The products of which the depthwise convolution and its gradients are made, on rows that hold one vector of channels
// at every column. Included once per instruction set, after vector.h.
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

// out[r][w] = sums of ROWS neighbouring output rows, from rows with their padding in memory
template <class A, int K, int S, int ROWS>
void convolve_into(A* out,                   // [ROWS][width][LANES]
                   const Row<A>* rows,       // [K + S*(ROWS-1)]
                   const Vector<A>* weight,  // [K*K]
                   Vector<A> bias, int64_t width) {
  const auto emit = [&](int r, int64_t w, Vector<A> z) { store(out + (r * width + w) * LANES<A>, z); };
  convolve_rows<A, K, S, ROWS, false>(rows, weight, bias, width, 0, emit);
}

// Calls f with COLUMNS as a compile-time constant for all blocks of `width` columns: f.template operator()<COLUMNS>(first).
// float64 is for checking gradients, not for speed: it goes column by column, which halves the code.
template <class A, class F>
MF_INLINE void with_columns(int64_t width, const F& f) {
  constexpr int block = sizeof(A) == 4 ? 4 : 1;
  int64_t column = 0;
  for (; column + block <= width; column += block) f.template operator()<block>(column);
  if constexpr (block > 1) {
    switch (width - column) {
      case 3: return f.template operator()<3>(column);
      case 2: return f.template operator()<2>(column);
      case 1: return f.template operator()<1>(column);
    }
  }
}

// d_weight[u][v] += sum_j g[j] x_u[S*j + v], d_bias += sum_j g[j], for one output row.
// BORDERED: the padding of x is not in memory.
template <class A, int K, int S, bool BORDERED>
MF_INLINE void add_weight_gradient(Vector<A>* sums,     // [K*K + 1], the bias last
                                   const Row<A>& g,     // column 0 first
                                   const Row<A>* rows,  // [K]
                                   int64_t width, int64_t input_width) {
  Vector<A> acc[K * K], total = sums[K * K];
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) acc[t] = sums[t];
  const auto add = [&]<int COLUMNS, bool CHECKED>(int64_t column) {
    Vector<A> gradient[COLUMNS];
#pragma GCC unroll 4
    for (int j = 0; j < COLUMNS; ++j) total += gradient[j] = g[column + j];
#pragma GCC unroll 5
    for (int u = 0; u < K; ++u) {
#pragma GCC unroll 11
      for (int i = 0; i < S * (COLUMNS - 1) + K; ++i) {
        const int64_t at = column * S + i;
        if (CHECKED && (at < K / 2 || at >= K / 2 + input_width)) continue;
        const Vector<A> x = rows[u][at];
#pragma GCC unroll 4
        for (int j = 0; j < COLUMNS; ++j) {
          if (i - j * S >= 0 && i - j * S < K) acc[u * K + i - j * S] += gradient[j] * x;
        }
      }
    }
  };
  with_columns<A>(width, [&]<int COLUMNS>(int64_t column) {
    const bool inside = column * S >= K / 2 && (column + COLUMNS - 1) * S + K <= K / 2 + input_width;
    if (!BORDERED || inside) {
      add.template operator()<COLUMNS, false>(column);
    } else {
      add.template operator()<COLUMNS, BORDERED>(column);
    }
  });
#pragma GCC unroll 25
  for (int t = 0; t < K * K; ++t) sums[t] = acc[t];
  sums[K * K] = total;
}

// d_x[w] = sum over the taps that reach it: output row (h + K/2 - u) / S and column (w + K/2 - v) / S where they divide.
// Calls emit(w, d_x[w]). BORDERED: g has no zeros around it in memory.
template <class A, int K, int S, bool BORDERED, class Emit>
MF_INLINE void input_gradient_row(const Row<A>* g_rows,     // [K] by tap u: column 0 of its output row, null where none
                                  const Vector<A>* weight,  // [K*K]
                                  int64_t width, int64_t g_width, const Emit& emit) {
  constexpr int pad = K / 2;
  const auto make = [&]<int COLUMNS, bool CHECKED>(int64_t column) {  // input columns from S*column on
#pragma GCC unroll 2
    for (int phase = 0; phase < S; ++phase) {
      Vector<A> acc[COLUMNS] = {};
#pragma GCC unroll 5
      for (int u = 0; u < K; ++u) {
        if (g_rows[u].at == nullptr) continue;
#pragma GCC unroll 5
        for (int v = 0; v < K; ++v) {
          if ((phase + pad + S * K - v) % S != 0) continue;
          const int shift = (phase + pad + S * K - v) / S - K;
#pragma GCC unroll 4
          for (int j = 0; j < COLUMNS; ++j) {
            const int64_t at = column + j + shift;
            if (CHECKED && (at < 0 || at >= g_width)) continue;
            acc[j] += weight[u * K + v] * g_rows[u][at];
          }
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < COLUMNS; ++j) {
        const int64_t w = (column + j) * S + phase;
        if (S == 1 || w < width) emit(w, acc[j]);
      }
    }
  };
  with_columns<A>((width + S - 1) / S, [&]<int COLUMNS>(int64_t column) {
    const bool inside = column >= pad && column + COLUMNS + pad <= g_width;
    if (!BORDERED || inside) {
      make.template operator()<COLUMNS, false>(column);
    } else {
      make.template operator()<COLUMNS, BORDERED>(column);
    }
  });
}

}  // namespace mf::MF_ISA
