// Depthwise filters as the kernels read them: packed once a call, one vector of output channels for each tap.
// Included once per instruction set, after vector.h.
//
// Legend: K kernel side, O output channels, T stored type, A accumulator, block i is the channels from i*LANES on.

namespace mf::MF_ISA {

// packed[block][t][lane] with the bias as tap K*K; zeros in the lanes that do not exist
template <class T>
void pack_filters(Accumulator<T>* packed,  // [blocks][K*K + 1][LANES]
                  const T* weight,         // (O, 1, K, K)
                  const T* bias,           // (O), or null
                  int64_t O, int taps) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int64_t o = 0; o < O; o += lanes, packed += (taps + 1) * lanes) {
    const int used = int(O - o < lanes ? O - o : lanes);
    for (int t = 0; t < taps; t += lanes) {
      const int here = taps - t < lanes ? taps - t : lanes;
      Vector<A> square[lanes];
      for (int i = 0; i < lanes; ++i) square[i] = i < used ? load(weight + (o + i) * taps + t, here) : Vector<A>{};
      transpose(square);
      for (int i = 0; i < here; ++i) store(packed + (t + i) * lanes, square[i]);
    }
    store(packed + taps * lanes, bias != nullptr ? load(bias + o, used) : Vector<A>{});
  }
}

// The gradients of all filters: the sums of every part, added in order
template <class T>
void unpack_filter_gradients(T* d_weight, T* d_bias,
                             const Accumulator<T>* sums,  // [parts][blocks][K*K + 1][LANES]
                             int64_t parts, int64_t O, int taps) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  const int64_t part_size = (O + lanes - 1) / lanes * (taps + 1) * lanes;
  for (int64_t o = 0; o < O; o += lanes) {
    const int used = int(O - o < lanes ? O - o : lanes);
    for (int t = 0; t <= taps; ++t, sums += lanes) {
      Vector<A> total{};
      for (int64_t part = 0; part < parts; ++part) total += load(sums + part * part_size);
      T rounded[lanes];
      store(static_cast<T*>(rounded), total);
      for (int i = 0; i < used; ++i) (t < taps ? d_weight[(o + i) * taps + t] : d_bias[o + i]) = rounded[i];
    }
  }
}

// One block's filters
template <class A, int K>
struct Filters {
  Vector<A> tap[K * K], bias;
  MF_INLINE explicit Filters(const A* packed) {  // [K*K + 1][LANES]
    for (int t = 0; t < K * K; ++t) tap[t] = load(packed + t * LANES<A>);
    bias = load(packed + K * K * LANES<A>);
  }
};

}  // namespace mf::MF_ISA
