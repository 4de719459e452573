// One vector of the instruction set that is being compiled: loads, stores, exp2, gelu, transpose. No include guard: once
// per instruction set, in its namespace. T is the stored type (float, double, bfloat16), A = Accumulator<T> what is
// computed in (float for bfloat16), V a vector of A.

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
template <class V>
using Lane = decltype(+V{}[0]);

template <class A>
MF_INLINE Vector<A> broadcast(A value) {
  return value - Vector<A>{};
}

// b where the comparison fails, so a NaN in b stays
template <class V>
MF_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

// The larger, NaN where either is one, as torch.maximum
template <class V>
MF_INLINE V maximum_or_nan(V a, V b) {
  return (a > b) | (a != a) ? a : b;
}

template <class V>
MF_INLINE V minimum(V a, V b) {
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
typedef int16_t HalfIntegers __attribute__((vector_size(MF_ISA_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(MF_ISA_BYTES)));

// Integers of 16 bits to 32. GCC makes halves of a vector where it is left to itself, and takes the unmasked intrinsics
// for something uninitialised.
#if defined(MF_ISA_AVX512)
MF_INLINE IntegerVector<float> widen(HalfIntegers v) {
  return (IntegerVector<float>)_mm512_maskz_cvtepi16_epi32(0xffff, (__m256i)v);
}
MF_INLINE Words widen(HalfWords v) { return (Words)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
#elif defined(MF_ISA_AVX2)
MF_INLINE IntegerVector<float> widen(HalfIntegers v) { return (IntegerVector<float>)_mm256_cvtepi16_epi32((__m128i)v); }
MF_INLINE Words widen(HalfWords v) { return (Words)_mm256_cvtepu16_epi32((__m128i)v); }
#else
MF_INLINE IntegerVector<float> widen(HalfIntegers v) { return __builtin_convertvector(v, IntegerVector<float>); }
MF_INLINE Words widen(HalfWords v) { return __builtin_convertvector(v, Words); }
#endif

MF_INLINE Vector<float> from_bf16(HalfWords bits) { return (Vector<float>)(widen(bits) << 16); }

// Rounds to nearest even; NaN becomes a quiet NaN, as torch does
MF_INLINE HalfWords to_bf16(Vector<float> v) {
#if defined(MF_ISA_PAIRS)
  return (HalfWords)_mm512_cvtneps_pbh((__m512)v);
#else
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : Words{} + 0x7fc0u, HalfWords);
#endif
}

MF_INLINE Vector<float> load(const bfloat16* source) {
  HalfWords bits;
  __builtin_memcpy(&bits, source, sizeof(bits));
  return from_bf16(bits);
}

template <class A>
MF_INLINE void store(A* target, Vector<A> v) {
  __builtin_memcpy(target, &v, sizeof(v));
}

MF_INLINE void store(bfloat16* target, Vector<float> v) {
  const HalfWords half = to_bf16(v);
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
    return from_bf16((HalfWords)_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), source));
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

// ---- 2^x for x < 127 (float), 1023 (double); 0 where the result would be denormal

// Where x is NaN, the smallest normal number
MF_INLINE Vector<float> exp2(Vector<float> x) {
  const Vector<float> clamped = maximum(x, broadcast(-126.0f));
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
  const Vector<float> power = (Vector<float>)((IntegerVector<float>)p + ((IntegerVector<float>)shifted << 23));
  return x < -126.0f ? Vector<float>{} : power;
}

MF_INLINE Vector<double> exp2(Vector<double> x) {
  const Vector<double> clamped = maximum(x, broadcast(-1022.0));
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
  const Vector<double> power = (Vector<double>)((IntegerVector<double>)p + ((IntegerVector<double>)shifted << 52));
  return x < -1022.0 ? Vector<double>{} : power;
}

// Where x is NaN, that NaN
template <class V>
MF_INLINE V exp2_or_nan(V x) {
  const V power = exp2(x);
  return x == x ? power : x;
}

// 1/2 x (1 + erf(x / sqrt 2)). The complementary error function of |x| is e^(-z^2) times a smooth function of
// 1 / (1 + 0.4 z); the polynomial is its least-squares fit on Chebyshev nodes for z in [0, 9], error 1e-7 relative.
MF_INLINE Vector<float> gelu(Vector<float> x) {
  constexpr float coefficients[] = {1.4221468e-2f, 2.8882222e-3f, -2.4384575e-1f, 5.1270068e-1f, -2.6273799e-1f,
                                    3.7129688e-1f, 1.4246505e-1f, 2.3873353e-1f,  2.2420704e-1f, 7.0882001e-5f};
  const Vector<float> zero{};
  const Vector<float> z = maximum(x, zero - x) * 0.70710678118654752f;
  const Vector<float> t = 1.0f / (z * 0.4f + 1.0f);
  Vector<float> p = broadcast(coefficients[0]);
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = p * t + coefficients[i];
  const Vector<float> complement = exp2(z * z * float(-LOG2_E)) * p;
  return x * 0.5f * (x < zero ? complement : 2.0f - complement);
}

// ---- shuffles across two vectors

// Lanes FIRST, FIRST + STEP, ... of a and then b
template <int FIRST, int STEP, class V, int... LANE>
MF_INLINE V pick(V a, V b, Integers<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (FIRST + STEP * LANE)...);
#else
  return __builtin_shuffle(a, b, IntegerVector<Lane<V>>{(FIRST + STEP * LANE)...});
#endif
}

// a0 b0 a1 b1 ... (low halves) and the same of the high halves
template <int HALF, class V, int... LANE>
MF_INLINE V interleave(V a, V b, Integers<LANE...>) {
  constexpr int lanes = LANES<Lane<V>>;
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (HALF * lanes / 2 + LANE / 2 + (LANE % 2) * lanes)...);
#else
  return __builtin_shuffle(a, b, IntegerVector<Lane<V>>{(HALF * lanes / 2 + LANE / 2 + (LANE % 2) * lanes)...});
#endif
}

// A square of as many vectors as they have lanes, transposed in registers by log2(lanes) perfect shuffles
template <class V, int lanes>
MF_INLINE void transpose(V (&rows)[lanes]) {
  static_assert(lanes == LANES<Lane<V>>);
  using Sequence = IntegerSequence<lanes>;
#pragma GCC unroll 4
  for (int round = 1; round < lanes; round *= 2) {
    V mixed[lanes];
#pragma GCC unroll 8
    for (int i = 0; i < lanes / 2; ++i) {
      mixed[2 * i] = interleave<0>(rows[i], rows[i + lanes / 2], Sequence{});
      mixed[2 * i + 1] = interleave<1>(rows[i], rows[i + lanes / 2], Sequence{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = mixed[i];
  }
}

// Lane i of the result is the sum of all lanes of vectors[i]
template <class V, int lanes>
MF_INLINE V sum_each(V (&vectors)[lanes]) {
  static_assert(lanes == LANES<Lane<V>>);
  using Sequence = IntegerSequence<lanes>;
#pragma GCC unroll 4
  for (int n = lanes; n > 1; n /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      const V a = vectors[2 * i], b = vectors[2 * i + 1];
      vectors[i] = pick<0, 2>(a, b, Sequence{}) + pick<1, 2>(a, b, Sequence{});
    }
  }
  return vectors[0];
}

template <int DISTANCE, class V, int... LANE>
MF_INLINE V rotate(V v, Integers<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((LANE + DISTANCE) % LANES<Lane<V>>)...);
#else
  return __builtin_shuffle(v, IntegerVector<Lane<V>>{((LANE + DISTANCE) % LANES<Lane<V>>)...});
#endif
}

template <class V>
MF_INLINE Lane<V> largest(V v) {
  constexpr int lanes = LANES<Lane<V>>;
  using Sequence = IntegerSequence<lanes>;
  if constexpr (lanes > 8) v = maximum(v, rotate<8>(v, Sequence{}));
  if constexpr (lanes > 4) v = maximum(v, rotate<4>(v, Sequence{}));
  if constexpr (lanes > 2) v = maximum(v, rotate<2>(v, Sequence{}));
  return v[0] > v[1] ? v[0] : v[1];
}

template <class V>
MF_INLINE Lane<V> sum_lanes(V v) {
  Lane<V> total = 0;
  for (int i = 0; i < LANES<Lane<V>>; ++i) total += v[i];
  return total;
}

}  // namespace mf::MF_ISA
