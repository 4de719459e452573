// Former -> Mobile on CPU: every position attends over M tokens; the residual is included.
// Source: mf_kernels/reference.py, former_to_mobile.
//
// Legend: B batch, C channels, L = H*W positions, M tokens, N heads, E = C/N, T stored type, A accumulator.
#define MF_EACH_SET_FILE "cpu/former_to_mobile.cpp"
#include "cpu/token_rows.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "common/tokens.isa.h"
#include "cpu/tile.isa.h"
#include "cpu/token_products.isa.h"

namespace mf::MF_ISA {

// weights[m][p]: scores (base 2) in, softmax over the tokens out
template <class A, int M>
void softmax_over_tokens(A* weights, int64_t P, int64_t used) {
  for (int64_t p = 0; p < used; p += LANES<A>) {
    Vector<A> score[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) score[m] = load(weights + m * P + p);
    Vector<A> top = score[0];
#pragma GCC unroll 8
    for (int m = 1; m < M; ++m) top = maximum(top, score[m]);
    Vector<A> total{};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      score[m] = exp2_or_nan(score[m] - top);
      total += score[m];
    }
    const Vector<A> inverse = A(1) / total;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(weights + m * P + p, score[m] * inverse);
  }
}

// One span of one head of one sample
template <class T>
void former_to_mobile_span(T* y,                     // like x
                           const Accumulator<T>* k,  // [M][E], times scale * log2(e)
                           const Accumulator<T>* v,  // [M][E]
                           const T* x,               // first channel of the head, first position of the span
                           int64_t M, int64_t E, int64_t count, int64_t channel_stride, int64_t position_stride) {
  using A = Accumulator<T>;
  const int P = tile_positions<A>(E, count);
  Scratch<A> tile(E * P), weights(M * P);
  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P;
    const int64_t used = (here + LANES<A> - 1) / LANES<A> * LANES<A>;
    load_tile<T>(tile, P, E, here, x + begin * position_stride, channel_stride, position_stride);
    with_tokens(M, [&]<int TOKENS>() {
      rows_dot_tile<A, TOKENS>(weights, k, tile, E, P, used);
      softmax_over_tokens<A, TOKENS>(weights, P, used);
      add_rows<A, TOKENS>(tile, weights, v, E, P, used);
    });
    store_tile<T>(tile, P, E, here, y + begin * position_stride, channel_stride, position_stride);
  }
}

// One span of the gradient: d_x of its positions, and its share of d_k and d_v
template <class T>
void former_to_mobile_span_backward(Accumulator<T>* d_k_partial,    // [M][E]
                                    Accumulator<T>* d_v_partial,    // [M][E]
                                    T* d_x,                         // like x
                                    const T* d_y,                   // like x
                                    const Accumulator<T>* k_base2,  // [M][E], times scale * log2(e)
                                    const Accumulator<T>* k,        // [M][E], times scale
                                    const Accumulator<T>* v,        // [M][E]
                                    const T* x, int64_t M, int64_t E, int64_t count, Accumulator<T> scale,
                                    int64_t channel_stride, int64_t position_stride) {
  using A = Accumulator<T>;
  const int P = tile_positions<A>(E, count);
  Scratch<A> tile(E * P), d_tile(E * P), weights(M * P), d_scores(M * P);
  for (int64_t i = 0; i < M * E; ++i) d_k_partial[i] = d_v_partial[i] = 0;

  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P;
    const int64_t used = (here + LANES<A> - 1) / LANES<A> * LANES<A>;
    load_tile<T>(tile, P, E, here, x + begin * position_stride, channel_stride, position_stride);
    load_tile<T>(d_tile, P, E, here, d_y + begin * position_stride, channel_stride, position_stride);
    with_tokens(M, [&]<int TOKENS>() {
      rows_dot_tile<A, TOKENS>(weights, k_base2, tile, E, P, used);
      softmax_over_tokens<A, TOKENS>(weights, P, used);
      rows_dot_tile<A, TOKENS>(d_scores, v, d_tile, E, P, used);
      // Positions from `here` to `used` hold a softmax of zeros, but their d_y and x are zero: they add nothing
      add_tile_dots<A, TOKENS>(d_v_partial, weights, d_tile, E, P, used);
      for (int64_t p = 0; p < used; p += LANES<A>) {
        Vector<A> mean{};
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m) mean += load(weights + m * P + p) * load(d_scores + m * P + p);
#pragma GCC unroll 8
        for (int m = 0; m < TOKENS; ++m) {
          store(d_scores + m * P + p, load(weights + m * P + p) * (load(d_scores + m * P + p) - mean));
        }
      }
      add_tile_dots<A, TOKENS>(d_k_partial, d_scores, tile, E, P, used);
      add_rows<A, TOKENS>(d_tile, d_scores, k, E, P, used);  // on top of the residual's d_y
    });
    store_tile<T>(d_tile, P, E, here, d_x + begin * position_stride, channel_stride, position_stride);
  }
  for (int64_t i = 0; i < M * E; ++i) d_k_partial[i] *= scale;
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter forward_calls("former_to_mobile_fwd"), backward_calls("former_to_mobile_bwd");

// y may be x: a task reads its tile before it writes it
void former_to_mobile_into(const FeatureMap& y, const FeatureMap& x, const Tensor& k, const Tensor& v,
                           int64_t num_heads) {
  const AttentionProblem p(x, k, num_heads);
  count_served(forward_calls);
  with_dtype(x.tensor.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A scale = A(1) / std::sqrt(A(p.E));
    const T *x_data = data<T>(x.tensor), *k_data = data<T>(k), *v_data = data<T>(v);
    T* y_data = mutable_data<T>(y.tensor);
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> k_rows(p.M * p.E), v_rows(p.M * p.E);
      for (int64_t i = begin; i < end; ++i) {
        const auto [b, n, first, count] = p.task(i);
        take_head<T>(k_rows, k_data, p, b, n, scale * A(LOG2_E));
        take_head<T>(v_rows, v_data, p, b, n, A(1));
        const int64_t offset = x.offset(b, n * p.E, first);
        MF_CALL(former_to_mobile_span<T>(y_data + offset, k_rows, v_rows, x_data + offset, p.M, p.E, count,
                                         x.channel_stride(), x.position_stride()));
      }
    });
  });
}

Arguments check(const char* op, const Tensor& x, const Tensor& k, const Tensor& v, int64_t num_heads) {
  const Arguments arguments = check_map(op, "x", x);
  arguments.tokens("k", k, x, num_heads);
  arguments.tensor("v", v, {k.size(0), k.size(1), k.size(2)});
  return arguments;
}

Tensor former_to_mobile_fwd(Tensor x_in, Tensor k, Tensor v, int64_t num_heads) {
  check("former_to_mobile_fwd", x_in, k, v, num_heads);
  const FeatureMap x = feature_map(x_in), y = new_map(x, x.channels, x.height, x.width);
  former_to_mobile_into(y, x, as_contiguous(k), as_contiguous(v), num_heads);
  return y.tensor;
}

// x = former_to_mobile(x, k, v)
void former_to_mobile_in_place(Tensor x_in, Tensor k, Tensor v, int64_t num_heads) {
  const Arguments arguments = check("former_to_mobile_", x_in, k, v, num_heads);
  arguments.written("x", x_in);
  arguments.apart("x", x_in, "k", k);
  arguments.apart("x", x_in, "v", v);
  const FeatureMap x = feature_map(x_in);
  former_to_mobile_into(x, x, as_contiguous(k), as_contiguous(v), num_heads);
}

std::tuple<Tensor, Tensor, Tensor> former_to_mobile_bwd(Tensor d_y_in, Tensor x_in, Tensor k_in, Tensor v_in,
                                                        int64_t num_heads) {
  const Arguments arguments = check("former_to_mobile_bwd", x_in, k_in, v_in, num_heads);
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor k = as_contiguous(k_in), v = as_contiguous(v_in);  // (B, M, C)
  const AttentionProblem p(x, k, num_heads);
  const FeatureMap d_x = new_map(x, x.channels, x.height, x.width);
  const Tensor d_k = new_tensor({p.B, p.M, p.C}, k.scalar_type()), d_v = new_tensor({p.B, p.M, p.C}, k.scalar_type());
  count_served(backward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const A scale = A(1) / std::sqrt(A(p.E));
    const T *x_data = data<T>(x.tensor), *k_data = data<T>(k), *v_data = data<T>(v), *d_y_data = data<T>(d_y.tensor);
    T* d_x_data = mutable_data<T>(d_x.tensor);
    const int64_t rows = p.M * p.E;
    Scratch<A> d_k_partials(p.tasks() * rows), d_v_partials(p.tasks() * rows);
    torch::stable::parallel_for(0, p.tasks(), 1, [&](int64_t begin, int64_t end) {
      Scratch<A> k_base2(rows), k_rows(rows), v_rows(rows);
      for (int64_t i = begin; i < end; ++i) {
        const auto [b, n, first, count] = p.task(i);
        take_head<T>(k_base2, k_data, p, b, n, scale * A(LOG2_E));
        take_head<T>(k_rows, k_data, p, b, n, scale);
        take_head<T>(v_rows, v_data, p, b, n, A(1));
        const int64_t offset = x.offset(b, n * p.E, first);
        MF_CALL(former_to_mobile_span_backward<T>(d_k_partials + i * rows, d_v_partials + i * rows, d_x_data + offset,
                                                  d_y_data + offset, k_base2, k_rows, v_rows, x_data + offset, p.M, p.E,
                                                  count, scale, x.channel_stride(), x.position_stride()));
      }
    });
    sum_spans<T>(mutable_data<T>(d_k), d_k_partials, p);
    sum_spans<T>(mutable_data<T>(d_v), d_v_partials, p);
  });
  return {d_x.tensor, d_k, d_v};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("former_to_mobile_fwd.native", TORCH_BOX(&mf::former_to_mobile_fwd));
  m.impl("former_to_mobile_.native", TORCH_BOX(&mf::former_to_mobile_in_place));
  m.impl("former_to_mobile_bwd.native", TORCH_BOX(&mf::former_to_mobile_bwd));
}

#endif
