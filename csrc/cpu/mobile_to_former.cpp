// Mobile -> Former on CPU: M tokens attend over L positions; keys and values are the map itself.
// Source: mf_kernels/reference.py, mobile_to_former.
//
// Legend: B batch, C channels, L = H*W positions, M tokens, N heads, E = C/N, T stored type, A accumulator.
// Each (sample, head, span of positions) runs an online softmax on its own and leaves a partial (weighted sum, maximum,
// sum), merged at the end.
#define MF_EACH_SET_FILE "cpu/mobile_to_former.cpp"
#include "cpu/token_rows.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "common/tokens.isa.h"
#include "cpu/tile.isa.h"
#include "cpu/token_products.isa.h"
#include "cpu/mobile_to_former_few.isa.h"

namespace mf::MF_ISA {

// One span of one head of one sample: its weighted sum of positions, and the maximum and sum of its own softmax
template <class T>
void mobile_to_former_span(Accumulator<T>* partial,  // [M][E + 2]: weighted sum, maximum (base 2), sum
                           const Accumulator<T>* q,  // [M][E], times scale * log2(e)
                           const T* x,               // first channel of the head, first position of the span
                           int64_t M, int64_t E, int64_t count, int64_t channel_stride, int64_t position_stride,
                           Accumulator<T>* memory) {  // of one task
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (channel_stride == 1 && count <= FEW_POSITIONS) {
    return mobile_to_former_few<T>(partial, q, x, M, E, count, position_stride);
  }
  const int P = tile_positions<A>(E, count);
  A *tile = memory, *weights = tile + E * P, *gathered = weights + M * P;
  A highest[MAX_TOKENS];
  Vector<A> total[MAX_TOKENS];
  for (int64_t m = 0; m < M; ++m) highest[m] = -INFINITY, total[m] = Vector<A>{};
  for (int64_t i = 0; i < M * E; ++i) gathered[i] = 0;

  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P;
    const int64_t used = (here + lanes - 1) / lanes * lanes;
    load_tile<T>(tile, P, E, here, x + begin * position_stride, channel_stride, position_stride);
    with_tokens(M, [&]<int TOKENS>() { rows_dot_tile<A, TOKENS>(weights, q, tile, E, P, used); });
    for (int64_t m = 0; m < M; ++m) {
      A* row = weights + m * P;
      for (int64_t p = here; p < used; ++p) row[p] = -INFINITY;
      Vector<A> top = load(row);
      for (int64_t p = lanes; p < used; p += lanes) top = maximum(top, load(row + p));
      const A found = largest(top);
      if (found > highest[m]) {  // rescale what was summed under the old maximum
        const A correction = std::exp2(highest[m] - found);
        total[m] *= correction;
        for (int64_t c = 0; c < E; ++c) gathered[m * E + c] *= correction;
        highest[m] = found;
      }
      const A base = highest[m] == -INFINITY ? A(0) : highest[m];  // only -inf so far: terms of 0, not NaN
      for (int64_t p = 0; p < used; p += lanes) store(row + p, exp2_or_nan(load(row + p) - base));
      for (int64_t p = here; p < used; ++p) row[p] = 0;
      for (int64_t p = 0; p < used; p += lanes) total[m] += load(row + p);
    }
    with_tokens(M, [&]<int TOKENS>() { add_tile_dots<A, TOKENS>(gathered, weights, tile, E, P, used); });
  }
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t c = 0; c < E; ++c) partial[m * (E + 2) + c] = gathered[m * E + c];
    partial[m * (E + 2) + E] = highest[m];
    partial[m * (E + 2) + E + 1] = sum_lanes(total[m]);
  }
}

// One span of the gradient: d_x of its positions, and its share of d_q
template <class T>
void mobile_to_former_span_backward(
    Accumulator<T>* d_q_partial,       // [M][E]
    T* d_x,                            // like x
    const Accumulator<T>* q_base2,     // [M][E], times scale * log2(e)
    const Accumulator<T>* q,           // [M][E], times scale
    const Accumulator<T>* d_out,       // [M][E]
    const Accumulator<T>* statistics,  // [M][2]: maximum of the scores (base 2), sum of terms
    const Accumulator<T>* out,         // [M][E]
    const T* x, int64_t M, int64_t E, int64_t count, Accumulator<T> scale, int64_t channel_stride,
    int64_t position_stride, Accumulator<T>* memory) {  // of one task
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (channel_stride == 1 && count <= FEW_POSITIONS) {
    return mobile_to_former_few_backward<T>(d_q_partial, d_x, q_base2, q, d_out, statistics, out, x, M, E, count, scale,
                                            position_stride);
  }
  const int P = tile_positions<A>(E, count);
  A *tile = memory, *d_tile = tile + E * P, *weights = d_tile + E * P, *d_scores = weights + M * P;
  A delta[MAX_TOKENS];  // sum_c d_out out, in the order of rows_dot_tile: a saturated softmax then cancels to exactly 0
  for (int64_t m = 0; m < M; ++m) {
    Vector<A> sum{};
    for (int64_t c = 0; c < E; ++c) sum += broadcast(d_out[m * E + c]) * broadcast(out[m * E + c]);
    delta[m] = sum[0];
  }
  for (int64_t i = 0; i < M * E; ++i) d_q_partial[i] = 0;

  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P;
    const int64_t used = (here + lanes - 1) / lanes * lanes;
    load_tile<T>(tile, P, E, here, x + begin * position_stride, channel_stride, position_stride);
    with_tokens(M, [&]<int TOKENS>() {
      rows_dot_tile<A, TOKENS>(weights, q_base2, tile, E, P, used);
      rows_dot_tile<A, TOKENS>(d_scores, d_out, tile, E, P, used);
    });
    for (int64_t m = 0; m < M; ++m) {
      const A highest = statistics[2 * m], inverse = A(1) / statistics[2 * m + 1];
      for (int64_t p = 0; p < used; p += lanes) {
        const Vector<A> weight = exp2_or_nan(load(weights + m * P + p) - highest) * inverse;
        store(weights + m * P + p, weight);
        store(d_scores + m * P + p, weight * (load(d_scores + m * P + p) - delta[m]));
      }
      for (int64_t p = here; p < used; ++p) weights[m * P + p] = d_scores[m * P + p] = 0;
    }
    for (int64_t i = 0; i < E * P; ++i) d_tile[i] = 0;
    with_tokens(M, [&]<int TOKENS>() {
      add_rows<A, TOKENS>(d_tile, weights, d_out, E, P, used);  // x as the value
      add_rows<A, TOKENS>(d_tile, d_scores, q, E, P, used);     // x as the key
      add_tile_dots<A, TOKENS>(d_q_partial, d_scores, tile, E, P, used);
    });
    store_tile<T>(d_tile, P, E, here, d_x + begin * position_stride, channel_stride, position_stride);
  }
  for (int64_t i = 0; i < M * E; ++i) d_q_partial[i] *= scale;
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter forward_calls("mobile_to_former_fwd"), backward_calls("mobile_to_former_bwd");

// Room for the tiles, weights and sums of one task, whatever the instruction set takes for a tile
int64_t task_memory(const AttentionProblem& p) {
  constexpr int64_t most_lanes = 16, most_positions = 256;
  const int64_t positions = ceil_div(std::min(p.L, most_positions), most_lanes) * most_lanes;
  return 2 * (p.E + p.M) * positions + p.M * p.E;
}

std::tuple<Tensor, Tensor> mobile_to_former_fwd(Tensor x_in, Tensor q_in, int64_t num_heads) {
  check_map("mobile_to_former_fwd", "x", x_in).tokens("q", q_in, x_in, num_heads);
  const FeatureMap x = feature_map(x_in);
  const Tensor q = as_contiguous(q_in);  // (B, M, C)
  const AttentionProblem p(x, q, num_heads);
  const Tensor out = new_tensor({p.B, p.M, p.C}, q.scalar_type());
  // Not their log-sum-exp: rounded, it would err more in the backward weights than the scores themselves do
  const Tensor statistics = new_tensor({p.B, p.N, p.M, 2}, accumulator_dtype(q));
  count_served(forward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A scale = A(1) / std::sqrt(A(p.E));
    const T *x_data = data<T>(x.tensor), *q_data = data<T>(q);
    T* out_data = mutable_data<T>(out);
    A* statistics_data = mutable_data<A>(statistics);
    Scratch<A> partials(p.tasks() * p.M * (p.E + 2));
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> rows(p.M * p.E), memory(task_memory(p));
      for (int64_t i = begin; i < end; ++i) {
        const auto [b, n, first, count] = p.task(i);
        take_head<T>(rows, q_data, p, b, n, scale * A(LOG2_E));
        const T* source = x_data + x.offset(b, n * p.E, first);
        A* partial = partials + i * p.M * (p.E + 2);
        MF_CALL(mobile_to_former_span<T>(partial, rows, source, p.M, p.E, count, x.channel_stride(),
                                         x.position_stride(), memory));
      }
    });
    Scratch<A> gathered(p.E);
    for (int64_t row = 0; row < p.B * p.N * p.M; ++row) {  // merge the spans
      const int64_t m = row % p.M, n = row / p.M % p.N, b = row / p.M / p.N;
      const A* first = partials + ((b * p.N + n) * p.spans * p.M + m) * (p.E + 2);
      const int64_t stride = p.M * (p.E + 2);  // from one span to the next
      A highest = -INFINITY, total = 0;
      for (int64_t s = 0; s < p.spans; ++s) highest = std::max(highest, first[s * stride + p.E]);
      for (int64_t e = 0; e < p.E; ++e) gathered[e] = 0;
      for (int64_t s = 0; s < p.spans; ++s) {
        const A correction = highest == -INFINITY ? A(1) : std::exp2(first[s * stride + p.E] - highest);
        total += first[s * stride + p.E + 1] * correction;
        for (int64_t e = 0; e < p.E; ++e) gathered[e] += first[s * stride + e] * correction;
      }
      statistics_data[2 * row] = highest;
      statistics_data[2 * row + 1] = total;
      for (int64_t e = 0; e < p.E; ++e) {
        from_accumulator(out_data[(b * p.M + m) * p.C + n * p.E + e], gathered[e] / total);
      }
    }
  });
  return {out, statistics};
}

std::tuple<Tensor, Tensor> mobile_to_former_bwd(Tensor d_out_in, Tensor x_in, Tensor q_in, Tensor out_in,
                                                Tensor statistics_in, int64_t num_heads) {
  const Arguments arguments = check_map("mobile_to_former_bwd", "x", x_in);
  arguments.tokens("q", q_in, x_in, num_heads);
  arguments.tensor("d_out", d_out_in, {q_in.size(0), q_in.size(1), q_in.size(2)});
  arguments.tensor("out", out_in, {q_in.size(0), q_in.size(1), q_in.size(2)});
  arguments.tensor("statistics", statistics_in, {q_in.size(0), num_heads, q_in.size(1), 2}, accumulator_dtype(q_in));
  const FeatureMap x = feature_map(x_in);
  // (B, M, C); what was saved comes back in any layout
  const Tensor q = as_contiguous(q_in), d_out = as_contiguous(d_out_in), out = as_contiguous(out_in);
  const Tensor statistics = as_contiguous(statistics_in);  // (B, N, M, 2)
  const AttentionProblem p(x, q, num_heads);
  const FeatureMap d_x = new_map(x, x.channels, x.height, x.width);
  const Tensor d_q = new_tensor({p.B, p.M, p.C}, q.scalar_type());
  count_served(backward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A scale = A(1) / std::sqrt(A(p.E));
    const T *x_data = data<T>(x.tensor), *q_data = data<T>(q), *d_out_data = data<T>(d_out), *out_data = data<T>(out);
    const A* statistics_data = data<A>(statistics);
    T *d_x_data = mutable_data<T>(d_x.tensor), *d_q_data = mutable_data<T>(d_q);
    Scratch<A> partials(p.tasks() * p.M * p.E);
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> rows_base2(p.M * p.E), rows(p.M * p.E), d_rows(p.M * p.E), out_rows(p.M * p.E);
      Scratch<A> memory(task_memory(p));
      for (int64_t i = begin; i < end; ++i) {
        const auto [b, n, first, count] = p.task(i);
        take_head<T>(rows_base2, q_data, p, b, n, scale * A(LOG2_E));
        take_head<T>(rows, q_data, p, b, n, scale);
        take_head<T>(d_rows, d_out_data, p, b, n, A(1));
        take_head<T>(out_rows, out_data, p, b, n, A(1));
        const int64_t offset = x.offset(b, n * p.E, first);
        MF_CALL(mobile_to_former_span_backward<T>(partials + i * p.M * p.E, d_x_data + offset, rows_base2, rows, d_rows,
                                                  statistics_data + (b * p.N + n) * p.M * 2, out_rows, x_data + offset,
                                                  p.M, p.E, count, scale, x.channel_stride(), x.position_stride(),
                                                  memory));
      }
    });
    sum_spans<T>(d_q_data, partials, p);
  });
  return {d_x.tensor, d_q};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("mobile_to_former_fwd.native", TORCH_BOX(&mf::mobile_to_former_fwd));
  m.impl("mobile_to_former_bwd.native", TORCH_BOX(&mf::mobile_to_former_bwd));
}

#endif
