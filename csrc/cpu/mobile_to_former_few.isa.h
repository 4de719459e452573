// Mobile -> Former over a few positions that hold their channels together: the Former's own attention, and the last maps
// of small images. Lanes are channels, so nothing is transposed. Included once per instruction set, after vector.h.
//
// Legend: M tokens, E head width, P positions (at most FEW_POSITIONS), T stored type, A accumulator.

namespace mf::MF_ISA {

constexpr int FEW_POSITIONS = 8;

// Sums of products of each row with each position, in memory for every pair [M][P], padded to whole vectors
template <class A>
struct PairSums {
  static constexpr int lanes = LANES<A>;
  alignas(Vector<A>) A at[(MAX_TOKENS * FEW_POSITIONS + lanes - 1) / lanes * lanes];

  // at[m * P + p] = sum_e rows[m][e] x[p * x_stride + e]. All sums are added up in one order, whatever m and p.
  template <class T>
  MF_INLINE void fill(const A* rows, const T* x, int64_t M, int64_t P, int64_t E, int64_t x_stride) {
    const int64_t pairs = M * P;
    int64_t m = 0, p = 0;
    for (int64_t first = 0; first < pairs; first += lanes) {
      Vector<A> products[lanes];
      for (int i = 0; i < lanes; ++i) {
        products[i] = Vector<A>{};
        if (first + i >= pairs) continue;
        const A* row = rows + m * E;
        const T* position = x + p * x_stride;
        int64_t e = 0;
        for (; e + lanes <= E; e += lanes) products[i] += load(row + e) * load(position + e);
        if (e < E) products[i] += load(row + e, int(E - e)) * load(position + e, int(E - e));
        if (++p == P) p = 0, ++m;
      }
      store(at + first, sum_each(products));
    }
  }
};

// target[e] = sum_i weights[i] rows[i][e] (+ more_weights[i] more_rows[i][e]) of `count` rows
template <class T, class S>
MF_INLINE void combine_rows(T* target, const Accumulator<T>* weights, int64_t weight_stride, const S* rows,
                            int64_t row_stride, const Accumulator<T>* more_weights, const Accumulator<T>* more_rows,
                            int64_t count, int64_t E) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int64_t e = 0; e < E; e += lanes) {
    const int used = int(E - e < lanes ? E - e : lanes);
    Vector<A> total{};
    for (int64_t i = 0; i < count; ++i) {
      total += weights[i * weight_stride] * load(rows + i * row_stride + e, used);
      if (more_rows != nullptr) total += more_weights[i * weight_stride] * load(more_rows + i * row_stride + e, used);
    }
    store(target + e, total, used);
  }
}

// As mobile_to_former_span
template <class T>
void mobile_to_former_few(Accumulator<T>* partial,  // [M][E + 2]: weighted sum, maximum (base 2), sum
                          const Accumulator<T>* q,  // [M][E], times scale * log2(e)
                          const T* x, int64_t M, int64_t E, int64_t P, int64_t position_stride) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  PairSums<A> scores;
  scores.fill(q, x, M, P, E, position_stride);
  for (int64_t m = 0; m < M; ++m) {
    A *row = scores.at + m * P, highest = -INFINITY;
    for (int64_t p = 0; p < P; ++p) highest = row[p] > highest ? row[p] : highest;
    partial[m * (E + 2) + E] = highest;
    const A base = highest == -INFINITY ? A(0) : highest;  // only -inf: terms of 0, not NaN
    for (int64_t p = 0; p < P; ++p) row[p] -= base;
  }
  for (int64_t i = 0; i < M * P; i += lanes) store(scores.at + i, exp2_or_nan(load(scores.at + i)));
  for (int64_t m = 0; m < M; ++m) {
    const A* row = scores.at + m * P;
    A total = 0;
    for (int64_t p = 0; p < P; ++p) total += row[p];
    partial[m * (E + 2) + E + 1] = total;
    combine_rows<A, T>(partial + m * (E + 2), row, 1, x, position_stride, nullptr, nullptr, P, E);
  }
}

// As mobile_to_former_span_backward
template <class T>
void mobile_to_former_few_backward(
    Accumulator<T>* d_q_partial,       // [M][E]
    T* d_x,                            // like x
    const Accumulator<T>* q_base2,     // [M][E], times scale * log2(e)
    const Accumulator<T>* q,           // [M][E], times scale
    const Accumulator<T>* d_out,       // [M][E]
    const Accumulator<T>* statistics,  // [M][2]: maximum of the scores (base 2), sum of terms
    const Accumulator<T>* out,         // [M][E]
    const T* x, int64_t M, int64_t E, int64_t P, Accumulator<T> scale, int64_t position_stride) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  PairSums<A> weights, d_scores, delta;  // delta in the order of d_scores: a saturated softmax cancels to exactly 0
  weights.fill(q_base2, x, M, P, E, position_stride);
  d_scores.fill(d_out, x, M, P, E, position_stride);
  for (int64_t m = 0; m < M; ++m) {
    delta.fill(d_out + m * E, out + m * E, 1, 1, E, E);
    const A highest = statistics[2 * m];
    for (int64_t p = 0; p < P; ++p) weights.at[m * P + p] -= highest, d_scores.at[m * P + p] -= delta.at[0];
  }
  for (int64_t i = 0; i < M * P; i += lanes) store(weights.at + i, exp2_or_nan(load(weights.at + i)));
  for (int64_t m = 0; m < M; ++m) {
    const A inverse = A(1) / statistics[2 * m + 1];
    for (int64_t p = 0; p < P; ++p) {
      weights.at[m * P + p] *= inverse;
      d_scores.at[m * P + p] *= weights.at[m * P + p];
    }
    combine_rows<A, T>(d_q_partial + m * E, d_scores.at + m * P, 1, x, position_stride, nullptr, nullptr, P, E);
  }
  for (int64_t i = 0; i < M * E; ++i) d_q_partial[i] *= scale;
  for (int64_t p = 0; p < P; ++p) {  // x as the value, then as the key
    combine_rows<T, A>(d_x + p * position_stride, weights.at + p, P, d_out, E, d_scores.at + p, q, M, E);
  }
}

}  // namespace mf::MF_ISA
