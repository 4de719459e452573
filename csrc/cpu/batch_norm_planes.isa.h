// BatchNorm and activation of one channel of a contiguous map: lanes are positions. Included once per instruction set,
// after batch_norm.h.
//
// Legend: B samples of L positions each, `stride` from a sample's plane to the next one's, A stored type and accumulator.

namespace mf::MF_ISA {

// Calls f(at, lanes) for every vector of every plane and flush(b) after each plane, and after 64 vectors of a long one:
// the error of a sum grows with the longer of the parts and their number
template <class A, class F, class G>
MF_INLINE void for_plane_vectors(int64_t B, int64_t L, int64_t stride, const F& f, const G& flush) {
  constexpr int lanes = LANES<A>;
  constexpr int64_t part = 64 * lanes;
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t begin = 0; begin < L; begin += part) {
      const int64_t end = L - begin < part ? L : begin + part;
      int64_t l = begin;
      for (; l + lanes <= end; l += lanes) f(b, b * stride + l, lanes);
      if (l < end) f(b, b * stride + l, int(end - l));
      flush(b);
    }
  }
}

// sums[0] of the distances from `center`, sums[1] of their squares
template <class A>
void batch_norm_plane_distances(A* sums, const A* x, A center, int64_t B, int64_t L, int64_t stride) {
  A ones[LANES<A>];
  for (A& one : ones) one = A(1);
  Vector<A> total{}, part{}, squares{}, squares_part{};
  for_plane_vectors<A>(
      B, L, stride,
      [&](int64_t, int64_t at, int lanes) {
        const Vector<A> distance = (load(x + at, lanes) - center) * load(static_cast<const A*>(ones), lanes);
        part += distance;
        squares_part += distance * distance;
      },
      [&](int64_t) {
        total += part, squares += squares_part;
        part = squares_part = Vector<A>{};
      });
  sums[0] = sum_lanes(total);
  sums[1] = sum_lanes(squares);
}

// The norm of one channel, the slopes of a dynamic ReLU those of one sample
template <class A>
MF_INLINE NormVectors<A, 1> norm_of_plane(const ChannelNorm<A>& norm, int64_t c) {
  NormVectors<A, 1> n{};
  n.mean[0] = broadcast(norm.mean[c]), n.scale[0] = broadcast(norm.scale[c]), n.shift[0] = broadcast(norm.shift[c]);
  return n;
}

template <class A, Activation ACTIVATION>
MF_INLINE Slopes<A> slopes_of_plane(const ChannelNorm<A>& norm, int64_t plane) {
  Slopes<A> slopes{};
  if constexpr (ACTIVATION == Activation::dynamic_relu) {
    slopes = {broadcast(norm.slope1[plane]), broadcast(norm.slope2[plane])};
  }
  return slopes;
}

template <class A, Activation ACTIVATION>
void batch_norm_plane(A* y, const A* x, const ChannelNorm<A>& norm, int64_t c, int64_t C, int64_t B, int64_t L) {
  const NormVectors<A, 1> n = norm_of_plane(norm, c);
  for (int64_t b = 0; b < B; ++b) {
    const Slopes<A> slopes = slopes_of_plane<A, ACTIVATION>(norm, b * C + c);
    for_plane_vectors<A>(
        1, L, 0,
        [&](int64_t, int64_t l, int lanes) {
          const int64_t at = b * C * L + l;
          store(y + at, activate<A, ACTIVATION>(load(x + at, lanes) * n.scale[0] + n.shift[0], slopes), lanes);
        },
        [](int64_t) {});
  }
}

// The sums that every gradient needs: of d_y and of d_y (x - mean), and the gradients of each sample's slopes
template <class A, Activation ACTIVATION>
void batch_norm_plane_sums(A* sums,                   // [2]
                           A* d_slope1, A* d_slope2,  // [B][C] at this channel, for a dynamic ReLU
                           const A* d_out, const A* x, const ChannelNorm<A>& norm, int64_t c, int64_t C, int64_t B,
                           int64_t L) {
  const NormVectors<A, 1> n = norm_of_plane(norm, c);
  Vector<A> total{}, projected{};
  for (int64_t b = 0; b < B; ++b) {
    const Slopes<A> slopes = slopes_of_plane<A, ACTIVATION>(norm, b * C + c);
    Vector<A> part{}, projected_part{}, slope1_part{}, slope2_part{}, slope1_total{}, slope2_total{};
    for_plane_vectors<A>(
        1, L, 0,
        [&](int64_t, int64_t l, int lanes) {
          const int64_t at = b * C * L + l;
          const NormGradient<A> g = norm_gradient<A, ACTIVATION>(load(d_out + at, lanes), load(x + at, lanes),
                                                                 n.mean[0], n.scale[0], n.shift[0], slopes);
          part += g.d_y;
          projected_part += g.d_y * g.centered;
          if constexpr (ACTIVATION == Activation::dynamic_relu) {
            slope1_part += g.d_line1 * g.y;
            slope2_part += g.d_line2 * g.y;
          }
        },
        [&](int64_t) {
          total += part, projected += projected_part, slope1_total += slope1_part, slope2_total += slope2_part;
          part = projected_part = slope1_part = slope2_part = Vector<A>{};
        });
    if constexpr (ACTIVATION == Activation::dynamic_relu) {
      d_slope1[b * C] = sum_lanes(slope1_total);
      d_slope2[b * C] = sum_lanes(slope2_total);
    }
  }
  sums[0] = sum_lanes(total);
  sums[1] = sum_lanes(projected);
}

template <class A, Activation ACTIVATION>
void batch_norm_plane_backward(A* d_x, const A* d_out, const A* x, const ChannelNorm<A>& norm, A average, A projection,
                               int64_t c, int64_t C, int64_t B, int64_t L) {
  const NormVectors<A, 1> n = norm_of_plane(norm, c);
  for (int64_t b = 0; b < B; ++b) {
    const Slopes<A> slopes = slopes_of_plane<A, ACTIVATION>(norm, b * C + c);
    for_plane_vectors<A>(
        1, L, 0,
        [&](int64_t, int64_t l, int lanes) {
          const int64_t at = b * C * L + l;
          const NormGradient<A> g = norm_gradient<A, ACTIVATION>(load(d_out + at, lanes), load(x + at, lanes),
                                                                 n.mean[0], n.scale[0], n.shift[0], slopes);
          store(d_x + at, norm_input_gradient<A>(g, n.scale[0], broadcast(average), broadcast(projection)), lanes);
        },
        [](int64_t) {});
  }
}

}  // namespace mf::MF_ISA
