// One vector of the instruction set that is being compiled: loads, stores, exp, transpose. No include guard: once per
// instruction set, in its namespace. T is the stored type (float, double, bfloat16), A = Accumulator<T> what is
// computed in (float for bfloat16).

namespace mf::MF_ISA {

#define MF_INLINE __attribute__((always_inline)) inline

template <class A>
struct VectorTypes;
template <>
struct VectorTypes<float> {
  using lane_integer = int32_t;
  typedef float vector __attribute__((vector_size(MF_ISA_BYTES)));
  typedef int32_t integer __attribute__((vector_size(MF_ISA_BYTES)));
};
template <>
struct VectorTypes<double> {
  using lane_integer = int64_t;
  typedef double vector __attribute__((vector_size(MF_ISA_BYTES)));
  typedef int64_t integer __attribute__((vector_size(MF_ISA_BYTES)));
};
template <class A>
using Vector = typename VectorTypes<A>::vector;
template <class A>
using IntegerVector = typename VectorTypes<A>::integer;
template <class A>
constexpr int LANES = MF_ISA_BYTES / int(sizeof(A));

template <class A>
MF_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// b where the comparison fails, so a NaN in b stays
template <class A>
MF_INLINE Vector<A> maximum(Vector<A> a, Vector<A> b) {
  return a > b ? a : b;
}

// The larger, NaN where either is one, as torch.maximum
template <class A>
MF_INLINE Vector<A> maximum_or_nan(Vector<A> a, Vector<A> b) {
  return (a > b) | (a != a) ? a : b;
}

template <class A>
MF_INLINE Vector<A> minimum(Vector<A> a, Vector<A> b) {
  return a < b ? a : b;
}

// ---- loads and stores of all lanes

template <class A>
MF_INLINE Vector<A> load(const A* source) {
  Vector<A> v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

typedef uint16_t HalfWords __attribute__((vector_size(MF_ISA_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(MF_ISA_BYTES)));

MF_INLINE Vector<float> widen(HalfWords bits) { return (Vector<float>)(__builtin_convertvector(bits, Words) << 16); }

MF_INLINE Vector<float> load(const bfloat16* source) {
  HalfWords bits;
  __builtin_memcpy(&bits, source, sizeof(bits));
  return widen(bits);
}

template <class A>
MF_INLINE void store(A* target, Vector<A> v) {
  __builtin_memcpy(target, &v, sizeof(v));
}

// Rounds to nearest even; NaN becomes a quiet NaN, as torch does
MF_INLINE void store(bfloat16* target, Vector<float> v) {
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words nan = Words{} + 0x7fc0u;
  const HalfWords half = __builtin_convertvector(v == v ? rounded : nan, HalfWords);
  __builtin_memcpy(target, &half, sizeof(half));
}

// ---- loads and stores of the first `count` lanes; the other lanes are zero, their memory is not touched

template <class T>
MF_INLINE Vector<Accumulator<T>> load(const T* source, int count) {
  constexpr int lanes = LANES<Accumulator<T>>;
  if (count >= lanes) return load(source);
#if defined(MF_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return (Vector<float>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), source);
  } else if constexpr (sizeof(T) == 8) {
    return (Vector<double>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), source);
  } else {
    return widen((HalfWords)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), source));
  }
#else
  T padded[lanes] = {};
  for (int i = 0; i < count; ++i) padded[i] = source[i];
  return load(static_cast<const T*>(padded));
#endif
}

template <class T>
MF_INLINE void store(T* target, Vector<Accumulator<T>> v, int count) {
  constexpr int lanes = LANES<Accumulator<T>>;
  if (count >= lanes) return store(target, v);
#if defined(MF_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    return _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), (__m512)v);
  } else if constexpr (sizeof(T) == 8) {
    return _mm512_mask_storeu_pd(target, __mmask8((1u << count) - 1), (__m512d)v);
  }
#endif
  T padded[lanes];
  store(static_cast<T*>(padded), v);
  for (int i = 0; i < count; ++i) target[i] = padded[i];
}

// ---- 2^x for x <= 0: softmax terms, with log2(e) folded into the scores. 0 where the result would be denormal; NaN
// stays, whatever its bits.

template <class A>
MF_INLINE Vector<A> zero_below(A bound, Vector<A> x, Vector<A> power) {
  const Vector<A> result = x < bound ? Vector<A>{} : power;
  return x == x ? result : x;
}

MF_INLINE Vector<float> exp2_nonpositive(Vector<float> x) {
  const Vector<float> clamped = maximum<float>(broadcast(-126.0f), x);
  const Vector<float> shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const Vector<float> r = clamped - (shifted - 12582912.0f);
  Vector<float> p = broadcast(1.5252734e-5f);  // Taylor of 2^r: the next term is below a rounding for |r| <= 1/2
  p = p * r + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return zero_below<float>(-126.0f, x,
                           (Vector<float>)((IntegerVector<float>)p + ((IntegerVector<float>)shifted << 23)));
}

MF_INLINE Vector<double> exp2_nonpositive(Vector<double> x) {
  const Vector<double> clamped = maximum<double>(broadcast(-1022.0), x);
  const Vector<double> shifted = clamped + 6755399441055744.0;  // 1.5 * 2^52
  const Vector<double> r = (clamped - (shifted - 6755399441055744.0)) * 0.693147180559945309417;
  Vector<double> p = broadcast(1.0 / 6227020800.0);  // Taylor of e^r, |r| <= ln(2)/2
  // clang-format off
  constexpr double inverse_factorials[] = {1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0, 1.0 / 362880.0,
                                           1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,     1.0 / 120.0,
                                           1.0 / 24.0,        1.0 / 6.0,        0.5,             1.0,
                                           1.0};
  // clang-format on
  for (double term : inverse_factorials) p = p * r + term;
  return zero_below<double>(-1022.0, x,
                            (Vector<double>)((IntegerVector<double>)p + ((IntegerVector<double>)shifted << 52)));
}

// ---- shuffles across two vectors

template <class A, int FIRST, int STEP, int... LANE>
MF_INLINE Vector<A> pick(Vector<A> a, Vector<A> b, Integers<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + STEP * LANE)...);
#else
  return __builtin_shuffle(a, b, IntegerVector<A>{(FIRST + STEP * LANE)...});
#endif
}

// a0 b0 a1 b1 ... (low halves) and the same of the high halves
template <class A, int HALF, int... LANE>
MF_INLINE Vector<A> interleave(Vector<A> a, Vector<A> b, Integers<LANE...>) {
  constexpr int lanes = LANES<A>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (HALF * lanes / 2 + LANE / 2 + (LANE % 2) * lanes)...);
#else
  return __builtin_shuffle(a, b, IntegerVector<A>{(HALF * lanes / 2 + LANE / 2 + (LANE % 2) * lanes)...});
#endif
}

// The square of LANES x LANES values, transposed in registers by log2(LANES) perfect shuffles
template <class A>
MF_INLINE void transpose(Vector<A> (&rows)[LANES<A>]) {
  constexpr int lanes = LANES<A>;
  using Sequence = IntegerSequence<lanes>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    Vector<A> mixed[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      mixed[2 * i] = interleave<A, 0>(rows[i], rows[i + lanes / 2], Sequence{});
      mixed[2 * i + 1] = interleave<A, 1>(rows[i], rows[i + lanes / 2], Sequence{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = mixed[i];
  }
}

// Lane i of the result is the sum of all lanes of vectors[i]
template <class A>
MF_INLINE Vector<A> sum_each(Vector<A> (&vectors)[LANES<A>]) {
  constexpr int lanes = LANES<A>;
  using Sequence = IntegerSequence<lanes>;
#pragma GCC unroll 4
  for (int n = lanes; n > 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      const Vector<A> a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = pick<A, 0, 2>(a, b, Sequence{}) + pick<A, 1, 2>(a, b, Sequence{});
    }
  }
  return vectors[0];
}

template <class A, int DISTANCE, int... LANE>
MF_INLINE Vector<A> rotate(Vector<A> v, Integers<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((LANE + DISTANCE) % LANES<A>)...);
#else
  return __builtin_shuffle(v, IntegerVector<A>{((LANE + DISTANCE) % LANES<A>)...});
#endif
}

template <class A>
MF_INLINE A largest(Vector<A> v) {
  using Sequence = IntegerSequence<LANES<A>>;
  if constexpr (LANES<A> > 8) v = maximum<A>(v, rotate<A, 8>(v, Sequence{}));
  if constexpr (LANES<A> > 4) v = maximum<A>(v, rotate<A, 4>(v, Sequence{}));
  if constexpr (LANES<A> > 2) v = maximum<A>(v, rotate<A, 2>(v, Sequence{}));
  return v[0] > v[1] ? v[0] : v[1];
}

template <class A>
MF_INLINE A sum(Vector<A> v) {
  A total = 0;
  for (int i = 0; i < LANES<A>; ++i) total += v[i];
  return total;
}

}  // namespace mf::MF_ISA
