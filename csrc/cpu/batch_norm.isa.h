// What BatchNorm with batch statistics and the activation behind it compute on vectors, in both layouts.
// Included once per instruction set, after vector.h and activation.h.
//
// Legend: C channels, A stored type and accumulator in one: float32 and float64 are what is served.

namespace mf::MF_ISA {

// The norm of V vectors: lanes are channels, or every lane the same one
template <class A, int V>
struct NormVectors {
  Vector<A> mean[V], scale[V], shift[V];  // y = x scale + shift
  Slopes<A> slopes[V];
};

// The gradient of the normalized value y; for a dynamic ReLU also the two lines' shares of the output's gradient
template <class A>
struct NormGradient {
  Vector<A> centered, y, d_y, d_line1, d_line2;
};

template <class A, Activation ACTIVATION>
MF_INLINE NormGradient<A> norm_gradient(Vector<A> d_out, Vector<A> x, Vector<A> mean, Vector<A> scale, Vector<A> shift,
                                        const Slopes<A>& slopes) {
  NormGradient<A> g;
  g.centered = x - mean;
  g.y = x * scale + shift;
  g.d_y = d_out;
  if constexpr (ACTIVATION == Activation::relu6) {
    g.d_y = (g.y > Vector<A>{}) & (g.y < broadcast(A(6))) ? d_out : Vector<A>{};
  }
  if constexpr (ACTIVATION == Activation::dynamic_relu) {
    const Vector<A> line1 = slopes.first * g.y, line2 = slopes.second * g.y;
    // 1 where the first line wins, 0 where the second, 1/2 each on a tie
    const Vector<A> share1 = line1 > line2 ? broadcast(A(1)) : line1 < line2 ? Vector<A>{} : broadcast(A(0.5));
    g.d_line1 = d_out * share1;
    g.d_line2 = d_out - g.d_line1;
    g.d_y = g.d_line1 * slopes.first + g.d_line2 * slopes.second;
  }
  return g;
}

// d_x = scale (d_y - mean of d_y - centered * projection)
template <class A>
MF_INLINE Vector<A> norm_input_gradient(const NormGradient<A>& g, Vector<A> scale, Vector<A> average,
                                        Vector<A> projection) {
  return scale * (g.d_y - average - g.centered * projection);
}

}  // namespace mf::MF_ISA
