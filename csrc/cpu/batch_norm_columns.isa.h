// BatchNorm and activation of a channels_last map: lanes are channels. Included once per instruction set, after
// batch_norm.h.
//
// Legend: C channels, S samples of L positions each, A stored type and accumulator. Pointers are at the first channel.

namespace mf::MF_ISA {

// Calls f.template operator()<V>(c, used) for all channels: V vectors from c on, the last of them with `used` lanes
template <class A, class F>
MF_INLINE void for_channel_vectors(int64_t C, const F& f) {
  constexpr int lanes = LANES<A>;
  int64_t c = 0;
  for (; c + 2 * lanes <= C; c += 2 * lanes) f.template operator()<2>(c, lanes);
  for (; c < C; c += lanes) f.template operator()<1>(c, int(C - c < lanes ? C - c : lanes));
}

// Loads V vectors. Two are always whole, which the compiler is to know.
template <class A, int V>
MF_INLINE void load_vectors(Vector<A> (&target)[V], const A* source, int used) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) target[v] = load(source + v * LANES<A>, V > 1 ? LANES<A> : used);
}

template <class A, int V>
MF_INLINE void store_vectors(A* target, const Vector<A> (&source)[V], int used) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) store(target + v * LANES<A>, source[v], V > 1 ? LANES<A> : used);
}

template <class A, int V>
MF_INLINE NormVectors<A, V> norm_of_channels(const ChannelNorm<A>& norm, int64_t c, int used) {
  NormVectors<A, V> n{};
  load_vectors(n.mean, norm.mean + c, used);
  load_vectors(n.scale, norm.scale + c, used);
  load_vectors(n.shift, norm.shift + c, used);
  return n;
}

template <class A, int V>
MF_INLINE void take_slopes_of(NormVectors<A, V>& n, const ChannelNorm<A>& norm, int64_t sample, int64_t c, int64_t C,
                              int used) {
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    const int64_t at = sample * C + c + v * LANES<A>;
    n.slopes[v] = {load(norm.slope1 + at, V > 1 ? LANES<A> : used), load(norm.slope2 + at, V > 1 ? LANES<A> : used)};
  }
}

// Sum of each channel over `count` positions, of the differences from its first value: they lose less of their digits
// where all values are far from zero. And the sum of squared distances from the mean of these positions.
template <class A>
void batch_norm_columns_statistics(A* sum, A* squares,  // [C]
                                   const A* x, int64_t count, int64_t C) {
  for_channel_vectors<A>(C, [&]<int V>(int64_t c, int used) {
    Vector<A> total[V] = {}, distance[V] = {}, pivot[V], value[V];
    load_vectors(pivot, x + c, used);
    for (int64_t l = 0; l < count; ++l) {
      load_vectors(value, x + l * C + c, used);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) total[v] += value[v] - pivot[v];
    }
    store_vectors(sum + c, total, used);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) pivot[v] += total[v] * (A(1) / A(count));
    for (int64_t l = 0; l < count; ++l) {
      load_vectors(value, x + l * C + c, used);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const Vector<A> centered = value[v] - pivot[v];
        distance[v] += centered * centered;
      }
    }
    store_vectors(squares + c, distance, used);
  });
}

// y = activation(norm(x)) of the samples [first, last)
template <class A, Activation ACTIVATION>
void batch_norm_columns(A* y, const A* x,  // at the first position
                        const ChannelNorm<A>& norm, int64_t first, int64_t last, int64_t L, int64_t C) {
  for_channel_vectors<A>(C, [&]<int V>(int64_t c, int used) {
    NormVectors<A, V> n = norm_of_channels<A, V>(norm, c, used);
    int64_t at = c;
    for (int64_t b = first; b < last; ++b) {
      if constexpr (ACTIVATION == Activation::dynamic_relu) take_slopes_of(n, norm, b, c, C, used);
      for (int64_t l = 0; l < L; ++l, at += C) {
        Vector<A> value[V];
        load_vectors(value, x + at, used);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          value[v] = activate<A, ACTIVATION>(value[v] * n.scale[v] + n.shift[v], n.slopes[v]);
        }
        store_vectors(y + at, value, used);
      }
    }
  });
}

// The sums that every gradient needs: of d_y and of d_y (x - mean) over all these samples, and the slopes' gradients
template <class A, Activation ACTIVATION>
void batch_norm_columns_sums(A* sums,      // [2][C]
                             A* d_slopes,  // [last - first][2][C], for a dynamic ReLU
                             const A* d_out, const A* x, const ChannelNorm<A>& norm, int64_t first, int64_t last,
                             int64_t L, int64_t C) {
  for_channel_vectors<A>(C, [&]<int V>(int64_t c, int used) {
    NormVectors<A, V> n = norm_of_channels<A, V>(norm, c, used);
    Vector<A> total[V] = {}, projected[V] = {};
    int64_t at = c;
    for (int64_t b = first; b < last; ++b) {
      Vector<A> d_slope1[V] = {}, d_slope2[V] = {};
      if constexpr (ACTIVATION == Activation::dynamic_relu) take_slopes_of(n, norm, b, c, C, used);
      for (int64_t l = 0; l < L; ++l, at += C) {
        Vector<A> value[V], gradient[V];
        load_vectors(value, x + at, used);
        load_vectors(gradient, d_out + at, used);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const NormGradient<A> g =
              norm_gradient<A, ACTIVATION>(gradient[v], value[v], n.mean[v], n.scale[v], n.shift[v], n.slopes[v]);
          total[v] += g.d_y;
          projected[v] += g.d_y * g.centered;
          if constexpr (ACTIVATION == Activation::dynamic_relu) {
            d_slope1[v] += g.d_line1 * g.y;
            d_slope2[v] += g.d_line2 * g.y;
          }
        }
      }
      if constexpr (ACTIVATION == Activation::dynamic_relu) {
        store_vectors(d_slopes + (b - first) * 2 * C + c, d_slope1, used);
        store_vectors(d_slopes + (b - first) * 2 * C + C + c, d_slope2, used);
      }
    }
    store_vectors(sums + c, total, used);
    store_vectors(sums + C + c, projected, used);
  });
}

template <class A, Activation ACTIVATION>
void batch_norm_columns_backward(A* d_x, const A* d_out, const A* x, const ChannelNorm<A>& norm, const A* average,
                                 const A* projection,  // [C]
                                 int64_t first, int64_t last, int64_t L, int64_t C) {
  for_channel_vectors<A>(C, [&]<int V>(int64_t c, int used) {
    NormVectors<A, V> n = norm_of_channels<A, V>(norm, c, used);
    Vector<A> mean_gradient[V], along[V];
    load_vectors(mean_gradient, average + c, used);
    load_vectors(along, projection + c, used);
    int64_t at = c;
    for (int64_t b = first; b < last; ++b) {
      if constexpr (ACTIVATION == Activation::dynamic_relu) take_slopes_of(n, norm, b, c, C, used);
      for (int64_t l = 0; l < L; ++l, at += C) {
        Vector<A> value[V], gradient[V];
        load_vectors(value, x + at, used);
        load_vectors(gradient, d_out + at, used);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const NormGradient<A> g =
              norm_gradient<A, ACTIVATION>(gradient[v], value[v], n.mean[v], n.scale[v], n.shift[v], n.slopes[v]);
          value[v] = norm_input_gradient<A>(g, n.scale[v], mean_gradient[v], along[v]);
        }
        store_vectors(d_x + at, value, used);
      }
    }
  });
}

}  // namespace mf::MF_ISA
