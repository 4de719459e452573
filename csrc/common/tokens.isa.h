// Mathematics of a few rows of tokens: their number as a constant, LayerNorm, attention among themselves. No include
// guard: once per instruction set, after common/vector.isa.h.

namespace mf::MF_ISA {

// Calls f.template operator()<M>() with the number of tokens as a compile-time constant
template <class F>
MF_INLINE void with_tokens(int64_t tokens, const F& f) {
  switch (tokens) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    default: return f.template operator()<8>();
  }
}

// Each of `rows` rows of x to mean 0 and variance 1, times weight, plus bias; D a multiple of the lanes
inline void layer_norm(float* x,             // [rows][D]
                       const float* weight,  // [D]
                       const float* bias,    // [D]
                       float eps, int64_t rows, int64_t D) {
  constexpr int lanes = LANES<float>;
  for (int64_t r = 0; r < rows; ++r, x += D) {
    Vector<float> total{};
    for (int64_t d = 0; d < D; d += lanes) total += load(x + d);
    const float mean = sum_lanes(total) / float(D);
    Vector<float> squares{};
    for (int64_t d = 0; d < D; d += lanes) {
      const Vector<float> centred = load(x + d) - mean;
      squares += centred * centred;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum_lanes(squares) / float(D) + eps);
    for (int64_t d = 0; d < D; d += lanes) {
      store(x + d, (load(x + d) - mean) * scale * load(weight + d) + load(bias + d));
    }
  }
}

// Attention of `rows` queries over M tokens, which are keys and values as they are, head by head: out[i] = the sum over
// j of the softmax over j of E^-0.5 q[i] . tokens[j], times tokens[j], E = D / heads a multiple of the lanes. q times
// `scale` carries the E^-0.5, and the log2(e) that makes powers of two of the softmax's terms.
inline void attend_tokens(float* out,           // [rows][D]
                          const float* q,       // [rows][D]
                          const float* tokens,  // [M][D]
                          float scale, int64_t M, int64_t rows, int64_t D, int64_t heads) {
  constexpr int lanes = LANES<float>, padded = MAX_TOKENS > lanes ? MAX_TOKENS : lanes;
  const int64_t E = D / heads;
  for (int64_t first = 0; first < D; first += E) {
    for (int64_t i = 0; i < rows; ++i) {
      float weights[padded];
      for (float& weight : weights) weight = -INFINITY;
      float top = -INFINITY;
      for (int64_t j = 0; j < M; ++j) {
        Vector<float> product{};
        for (int64_t d = first; d < first + E; d += lanes) product += load(q + i * D + d) * load(tokens + j * D + d);
        weights[j] = sum_lanes(product) * scale;
        top = weights[j] > top ? weights[j] : top;
      }
      float total = 0;
      for (int lane = 0; lane < padded; lane += lanes) {
        const Vector<float> power = exp2_or_nan(load(weights + lane) - top);
        store(weights + lane, power);
        total += sum_lanes(power);
      }
      for (int64_t d = first; d < first + E; d += lanes) {
        Vector<float> sum{};
        for (int64_t j = 0; j < M; ++j) sum += load(tokens + j * D + d) * weights[j];
        store(out + i * D + d, sum / total);
      }
    }
  }
}

}  // namespace mf::MF_ISA
