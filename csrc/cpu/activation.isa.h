// Activations of vectors, and their slopes. Included once per instruction set, after vector.h.

namespace mf::MF_ISA {

// The slopes of a dynamic ReLU, one of each a lane; unused by the other activations
template <class A>
struct Slopes {
  Vector<A> first, second;
};

template <class A, Activation ACTIVATION>
MF_INLINE Vector<A> activate(Vector<A> z, const Slopes<A>& slopes) {  // bounds first and z second, so that NaN stays
  const Vector<A> zero{}, one = broadcast(A(1)), six = broadcast(A(6));
  if constexpr (ACTIVATION == Activation::relu6) return maximum(zero, minimum(six, z));
  if constexpr (ACTIVATION == Activation::hardswish) {
    return z * maximum(zero, minimum(one, z * A(1.0 / 6) + A(0.5)));
  }
  if constexpr (ACTIVATION == Activation::dynamic_relu) return maximum_or_nan(slopes.first * z, slopes.second * z);
  return z;
}

// Calls f.template operator()<ACTIVATION>()
template <class F>
MF_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu6: return f.template operator()<Activation::relu6>();
    case Activation::hardswish: return f.template operator()<Activation::hardswish>();
    case Activation::dynamic_relu: return f.template operator()<Activation::dynamic_relu>();
    default: return f.template operator()<Activation::identity>();
  }
}

// row[i] = activation(row[i]) for `count` vectors
template <class A>
void activate_row(A* row, int64_t count, Activation activation, const Slopes<A>& slopes) {
  if (activation == Activation::identity) return;
  with_activation(activation, [&]<Activation ACTIVATION>() {
    for (int64_t i = 0; i < count * LANES<A>; i += LANES<A>) {
      store(row + i, activate<A, ACTIVATION>(load(row + i), slopes));
    }
  });
}

// d_y times the slope of the activation: `activation_gradient` of common/math.h for vectors
template <class A>
MF_INLINE Vector<A> activation_gradient(Vector<A> d_y, Vector<A> z, Activation activation) {
  const Vector<A> zero{}, three = broadcast(A(3));
  if (activation == Activation::relu6) return (z > zero) & (z < broadcast(A(6))) ? d_y : zero;
  if (activation == Activation::hardswish) {
    return z <= -three ? zero : z < three ? d_y * (z * A(1.0 / 3) + A(0.5)) : d_y;
  }
  return d_y;
}

}  // namespace mf::MF_ISA
