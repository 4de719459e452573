// The token side of both attentions: how positions are split into tasks, and token rows (B, M, C) taken apart by heads.
#pragma once

#include "cpu/boundary.h"

namespace mf {

// Legend: B batch, C channels, L = H*W positions, M tokens, N heads, E = C/N.
// A task is one head of one sample over one span of positions. Spans depend on the shape alone, never on the number
// of threads, so neither do the results.
struct AttentionProblem {
  static constexpr int64_t SPAN = 2048;  // positions that one task walks
  int64_t B, C, L, M, N, E, spans;

  AttentionProblem(const FeatureMap& x, const Tensor& tokens, int64_t num_heads)
      : B(x.batch), C(x.channels), L(x.positions()), M(tokens.size(1)), N(num_heads), E(C / N),
        spans(ceil_div(L, SPAN)) {}

  int64_t tasks() const { return B * N * spans; }

  struct Task {
    int64_t b, n, first, count;  // sample, head, first position, positions
  };
  Task task(int64_t i) const {
    const int64_t first = i % spans * SPAN;
    return {i / spans / N, i / spans % N, first, std::min(SPAN, L - first)};
  }
};

// rows[m][e] = source[b][m][n*E + e] * factor, in the accumulator's type
template <class T>
void take_head(Accumulator<T>* rows, const T* source, const AttentionProblem& p, int64_t b, int64_t n,
               Accumulator<T> factor) {
  for (int64_t m = 0; m < p.M; ++m) {
    const T* row = source + (b * p.M + m) * p.C + n * p.E;
    for (int64_t e = 0; e < p.E; ++e) rows[m * p.E + e] = to_accumulator(row[e]) * factor;
  }
}

// target[b][m][n*E + e] = sum over spans of partials[task][m][e]
template <class T>
void sum_spans(T* target, const Accumulator<T>* partials, const AttentionProblem& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    for (int64_t n = 0; n < p.N; ++n) {
      const Accumulator<T>* first = partials + (b * p.N + n) * p.spans * p.M * p.E;
      for (int64_t m = 0; m < p.M; ++m) {
        for (int64_t e = 0; e < p.E; ++e) {
          Accumulator<T> total = 0;
          for (int64_t s = 0; s < p.spans; ++s) total += first[(s * p.M + m) * p.E + e];
          from_accumulator(target[(b * p.M + m) * p.C + n * p.E + e], total);
        }
      }
    }
  }
}

}  // namespace mf
