// Spatial dynamic ReLU on CPU: y = max(a1 x, a2 x), the slopes of a position mixed from those of the tokens.
// Source: mf_kernels/reference.py, spatial_dynamic_relu.
//
// Legend: B batch, C channels, L = H*W positions, M tokens, T stored type, A accumulator.
// Token rows [M][2C] are a1 of all channels, then a2. The slopes of a position stay in registers. Forward, what lies on
// the lanes is what is contiguous: channels or positions. Backward, it is positions in both layouts, so that d_theta and
// d_alpha are the two products of token rows with a tile that attention has.
#define MF_EACH_SET_FILE "cpu/spatial_dynamic_relu.cpp"
#include "cpu/slopes.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "common/tokens.isa.h"
#include "cpu/tile.isa.h"
#include "cpu/token_products.isa.h"

namespace mf::MF_ISA {

template <class A, int M>
MF_INLINE Vector<A> mixed(const Vector<A> (&slopes)[M], const Vector<A> (&weights)[M]) {
  Vector<A> sum = slopes[0] * weights[0];
#pragma GCC unroll 8
  for (int m = 1; m < M; ++m) sum += slopes[m] * weights[m];
  return sum;
}

template <class T, int M>
MF_INLINE void spatial_vector(T* y, const T* x, const Vector<Accumulator<T>> (&slope1)[M],
                              const Vector<Accumulator<T>> (&slope2)[M], const Vector<Accumulator<T>> (&weights)[M],
                              int lanes) {
  using A = Accumulator<T>;
  const Vector<A> value = load(x, lanes);
  store(y, maximum_or_nan(mixed<A, M>(slope1, weights) * value, mixed<A, M>(slope2, weights) * value), lanes);
}

// `count` positions of `channels` channels, the positions neighbours in memory
template <class T, int M>
void spatial_planes(T* y, const T* x,
                    const Accumulator<T>* slopes,   // [M][2C] from the first channel
                    const Accumulator<T>* weights,  // [M][P]
                    int64_t channels, int64_t count, int64_t C, int64_t L, int64_t P) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int64_t c = 0; c < channels; ++c, y += L, x += L) {
    Vector<A> slope1[M], slope2[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      slope1[m] = broadcast(slopes[m * 2 * C + c]), slope2[m] = broadcast(slopes[m * 2 * C + C + c]);
    }
    for (int64_t p = 0; p < count; p += lanes) {
      Vector<A> weight[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) weight[m] = load(weights + m * P + p);
      spatial_vector<T, M>(y + p, x + p, slope1, slope2, weight, int(count - p < lanes ? count - p : lanes));
    }
  }
}

// `count` positions of all C channels, the channels neighbours in memory
template <class T, int M>
void spatial_rows(T* y, const T* x,
                  const Accumulator<T>* slopes,   // [M][2C]
                  const Accumulator<T>* weights,  // [M][P]
                  int64_t count, int64_t C, int64_t P) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int64_t c = 0; c < C; c += lanes) {
    const int here = int(C - c < lanes ? C - c : lanes);
    Vector<A> slope1[M], slope2[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      slope1[m] = load(slopes + m * 2 * C + c, here), slope2[m] = load(slopes + m * 2 * C + C + c, here);
    }
    for (int64_t p = 0; p < count; ++p) {
      Vector<A> weight[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) weight[m] = broadcast(weights[m * P + p]);
      spatial_vector<T, M>(y + p * C + c, x + p * C + c, slope1, slope2, weight, here);
    }
  }
}

// Of one sample, `count` positions of `channels` channels; of C channels where those are neighbours
template <class T>
void spatial_part(T* y, const T* x,
                  const Accumulator<T>* slopes,  // [M][2C] from the first channel
                  const T* alpha,                // [M][L] from the first position
                  int64_t M, int64_t channels, int64_t count, int64_t C, int64_t L, bool channels_last) {
  using A = Accumulator<T>;
  const int P = tile_positions<A>(channels_last ? C : 1, count);
  Scratch<A> weights(M * P);
  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P, at = channels_last ? begin * C : begin;
    load_tile<T>(weights, P, M, here, alpha + begin, L, 1);
    with_tokens(M, [&]<int TOKENS>() {
      if (channels_last) {
        spatial_rows<T, TOKENS>(y + at, x + at, slopes, weights, here, C, P);
      } else {
        spatial_planes<T, TOKENS>(y + at, x + at, slopes, weights, channels, here, C, L, P);
      }
    });
  }
}

// Channels summed in one accumulator before it goes to a second one: the error of a sum grows with the longer of the two
constexpr int64_t PARTIAL_SUM = 64;

// A tile of the gradient. In: lines = x, then d_y. Out: lines = what a1 and then a2 of each position and channel get
template <class A, int M>
void spatial_tile_backward(A* d_x,            // [C][P]
                           A* lines,          // [2C][P]
                           A* d_weights,      // [M][P]
                           const A* weights,  // [M][P]
                           const A* slopes,   // [M][2C]
                           int64_t C, int64_t P, int64_t used) {
  for (int64_t p = 0; p < used; p += LANES<A>) {
    Vector<A> weight[M], d_weight[M] = {};
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) weight[m] = load(weights + m * P + p);
    for (int64_t begin = 0; begin < C; begin += PARTIAL_SUM) {
      const int64_t end = C - begin < PARTIAL_SUM ? C : begin + PARTIAL_SUM;
      Vector<A> part[M] = {};
      for (int64_t c = begin; c < end; ++c) {
        A *line1 = lines + c * P + p, *line2 = lines + (C + c) * P + p;
        const Vector<A> x = load(line1), d_y = load(line2);
        Vector<A> token1[M], token2[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          token1[m] = broadcast(slopes[m * 2 * C + c]), token2[m] = broadcast(slopes[m * 2 * C + C + c]);
        }
        const Vector<A> slope1 = mixed<A, M>(token1, weight), slope2 = mixed<A, M>(token2, weight);
        const Vector<A> value1 = slope1 * x, value2 = slope2 * x;
        // 1 where the first line wins, 0 where the second, 1/2 each on a tie
        const Vector<A> share = value1 > value2 ? broadcast(A(1)) : value1 < value2 ? Vector<A>{} : broadcast(A(0.5));
        const Vector<A> gradient1 = d_y * share, gradient2 = d_y - gradient1;
        store(d_x + c * P + p, gradient1 * slope1 + gradient2 * slope2);
        const Vector<A> d_slope1 = gradient1 * x, d_slope2 = gradient2 * x;
        store(line1, d_slope1), store(line2, d_slope2);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) part[m] += d_slope1 * token1[m] + d_slope2 * token2[m];
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) d_weight[m] += part[m];
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(d_weights + m * P + p, d_weight[m]);
  }
}

// One span of the gradient: d_x and d_alpha of its positions, and its share of the token rows' gradient
template <class T>
void spatial_span_backward(T* d_x,                        // like x
                           Accumulator<T>* d_slopes,      // [M][2C]
                           T* d_alpha,                    // [M][L] from the first position
                           const T* d_y,                  // like x
                           const T* x,                    // first channel, first position of the span
                           const Accumulator<T>* slopes,  // [M][2C]
                           const T* alpha,                // [M][L] from the first position
                           int64_t M, int64_t C, int64_t L, int64_t count, int64_t channel_stride,
                           int64_t position_stride) {
  using A = Accumulator<T>;
  const int P = tile_positions<A>(C, count);
  Scratch<A> tile(C * P), lines(2 * C * P), weights(M * P), d_weights(M * P);
  for (int64_t i = 0; i < M * 2 * C; ++i) d_slopes[i] = 0;
  for (int64_t begin = 0; begin < count; begin += P) {
    const int64_t here = count - begin < P ? count - begin : P, offset = begin * position_stride;
    const int64_t used = (here + LANES<A> - 1) / LANES<A> * LANES<A>;
    load_tile<T>(lines, P, C, here, x + offset, channel_stride, position_stride);
    load_tile<T>(lines + C * P, P, C, here, d_y + offset, channel_stride, position_stride);
    load_tile<T>(weights, P, M, here, alpha + begin, L, 1);
    with_tokens(M, [&]<int TOKENS>() {
      // Positions from `here` to `used` have weights, x and d_y of zero: they add nothing
      spatial_tile_backward<A, TOKENS>(tile, lines, d_weights, weights, slopes, C, P, used);
      add_tile_dots<A, TOKENS>(d_slopes, weights, lines, 2 * C, P, used);
    });
    store_tile<T>(tile, P, C, here, d_x + offset, channel_stride, position_stride);
    store_tile<T>(d_weights, P, M, here, d_alpha + begin, L, 1);
  }
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter forward_calls("spatial_dynamic_relu_fwd"), backward_calls("spatial_dynamic_relu_bwd");

constexpr int64_t GRAIN = 4096;  // values that are worth a thread
constexpr int64_t SPAN = 2048;   // positions that one task of the gradient walks

// y may be x: every value is read once, just before it is written
void spatial_dynamic_relu_into(const FeatureMap& y, const FeatureMap& x, const Tensor& theta,  // (B, M, 2C)
                               const Tensor& alpha) {                                          // (B, M, H, W)
  const int64_t B = x.batch, C = x.channels, L = x.positions(), M = theta.size(1);
  count_served(forward_calls);
  with_dtype(x.tensor.scalar_type(), [&]<class T>() {
    Scratch<Accumulator<T>> slopes(B * M * 2 * C);
    take_token_slopes<T>(slopes, data<T>(theta), B * M, C);
    const T *x_data = data<T>(x.tensor), *alpha_data = data<T>(alpha);
    T* y_data = mutable_data<T>(y.tensor);
    // Samples are cut along what is the outer axis in memory
    const int64_t outer = x.channels_last ? L : C, inner = x.channels_last ? C : L;
    torch::stable::parallel_for(0, B * outer, ceil_div(GRAIN, inner), [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t b = begin / outer, first = begin % outer, here = std::min(end - begin, outer - first);
        const int64_t c = x.channels_last ? 0 : first, l = x.channels_last ? first : 0;
        MF_CALL(spatial_part<T>(y_data + begin * inner, x_data + begin * inner, slopes + b * M * 2 * C + c,
                                alpha_data + b * M * L + l, M, x.channels_last ? C : here, x.channels_last ? here : L,
                                C, L, x.channels_last));
        begin += here;
      }
    });
  });
}

Arguments check(const char* op, const Tensor& x, const Tensor& theta, const Tensor& alpha) {
  const Arguments arguments = check_map(op, "x", x);
  arguments.spatial_slopes(x, theta, alpha);
  return arguments;
}

Tensor spatial_dynamic_relu_fwd(Tensor x_in, Tensor theta, Tensor alpha) {
  check("spatial_dynamic_relu_fwd", x_in, theta, alpha);
  const FeatureMap x = feature_map(x_in), y = new_map(x, x.channels, x.height, x.width);
  spatial_dynamic_relu_into(y, x, as_contiguous(theta), as_contiguous(alpha));
  return y.tensor;
}

// x = spatial_dynamic_relu(x)
void spatial_dynamic_relu_in_place(Tensor x_in, Tensor theta, Tensor alpha) {
  const Arguments arguments = check("spatial_dynamic_relu_", x_in, theta, alpha);
  arguments.written("x", x_in);
  arguments.apart("x", x_in, "theta", theta);
  arguments.apart("x", x_in, "alpha", alpha);
  const FeatureMap x = feature_map(x_in);
  spatial_dynamic_relu_into(x, x, as_contiguous(theta), as_contiguous(alpha));
}

std::tuple<Tensor, Tensor, Tensor> spatial_dynamic_relu_bwd(Tensor d_y_in, Tensor x_in, Tensor theta_in,
                                                            Tensor alpha_in) {
  const Arguments arguments = check("spatial_dynamic_relu_bwd", x_in, theta_in, alpha_in);
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor theta = as_contiguous(theta_in), alpha = as_contiguous(alpha_in);  // (B, M, 2C), (B, M, H, W)
  const FeatureMap d_x = new_map(x, x.channels, x.height, x.width);
  const int64_t B = x.batch, C = x.channels, L = x.positions(), M = theta.size(1), row = M * 2 * C;
  const Tensor d_theta = new_tensor({B, M, 2 * C}, theta.scalar_type());
  const Tensor d_alpha = new_tensor({B, M, x.height, x.width}, alpha.scalar_type());
  count_served(backward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const int64_t spans = ceil_div(L, SPAN);
    Scratch<A> slopes(B * row), d_slopes(B * spans * row);
    const T *theta_data = data<T>(theta), *alpha_data = data<T>(alpha);
    const T *x_data = data<T>(x.tensor), *d_y_data = data<T>(d_y.tensor);
    T *d_x_data = mutable_data<T>(d_x.tensor), *d_theta_data = mutable_data<T>(d_theta);
    T* d_alpha_data = mutable_data<T>(d_alpha);
    take_token_slopes<T>(slopes, theta_data, B * M, C);
    torch::stable::parallel_for(0, B * spans, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / spans, first = i % spans * SPAN, offset = x.offset(b, 0, first);
        const int64_t at = b * M * L + first;
        MF_CALL(spatial_span_backward<T>(d_x_data + offset, d_slopes + i * row, d_alpha_data + at, d_y_data + offset,
                                         x_data + offset, slopes + b * row, alpha_data + at, M, C, L,
                                         std::min(SPAN, L - first), x.channel_stride(), x.position_stride()));
      }
    });
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t i = 0; i < row; ++i) {  // a1 and a2 are both 2 hsig(theta) + const
        A total = 0;
        for (int64_t s = 0; s < spans; ++s) total += d_slopes[(b * spans + s) * row + i];
        from_accumulator(d_theta_data[b * row + i], slope_gradient<A>(total, to_accumulator(theta_data[b * row + i])));
      }
    }
  });
  return {d_x.tensor, d_theta, d_alpha};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("spatial_dynamic_relu_fwd.native", TORCH_BOX(&mf::spatial_dynamic_relu_fwd));
  m.impl("spatial_dynamic_relu_.native", TORCH_BOX(&mf::spatial_dynamic_relu_in_place));
  m.impl("spatial_dynamic_relu_bwd.native", TORCH_BOX(&mf::spatial_dynamic_relu_bwd));
}

#endif
