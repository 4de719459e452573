// One vector of floats of the instruction set that is being compiled. No include guard: once per set, in its namespace.

namespace mf::engine::MF_LEVEL {

#define MF_INLINE __attribute__((always_inline)) inline

constexpr int LANES = MF_LEVEL_BYTES / 4;
constexpr int PER_BLOCK = BLOCK / LANES;  // vectors of a block

typedef float V __attribute__((vector_size(MF_LEVEL_BYTES)));
typedef int32_t VI __attribute__((vector_size(MF_LEVEL_BYTES)));
typedef uint32_t VU __attribute__((vector_size(MF_LEVEL_BYTES)));
typedef uint16_t VH __attribute__((vector_size(MF_LEVEL_BYTES / 2)));
typedef int16_t VS __attribute__((vector_size(MF_LEVEL_BYTES / 2)));

MF_INLINE V broadcast(float value) { return value - V{}; }

MF_INLINE V load(const float* source) {
  V v;
  __builtin_memcpy(&v, source, sizeof(v));
  return v;
}

MF_INLINE void store(float* target, V v) { __builtin_memcpy(target, &v, sizeof(v)); }

MF_INLINE V maximum(V a, V b) { return a > b ? a : b; }
MF_INLINE V minimum(V a, V b) { return a < b ? a : b; }

MF_INLINE V clamp(V x, float low, float high) { return minimum(maximum(x, broadcast(low)), broadcast(high)); }

// Integers of 16 bits to 32. GCC makes halves of a vector where it is left to itself, and takes the unmasked intrinsics
// for something uninitialised.
#if defined(MF_LEVEL_AVX512)
MF_INLINE VI widen(VS v) { return (VI)_mm512_maskz_cvtepi16_epi32(0xffff, (__m256i)v); }
MF_INLINE VU widen(VH v) { return (VU)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)v); }
#elif MF_LEVEL_BYTES == 32
MF_INLINE VI widen(VS v) { return (VI)_mm256_cvtepi16_epi32((__m128i)v); }
MF_INLINE VU widen(VH v) { return (VU)_mm256_cvtepu16_epi32((__m128i)v); }
#else
MF_INLINE VI widen(VS v) { return __builtin_convertvector(v, VI); }
MF_INLINE VU widen(VH v) { return __builtin_convertvector(v, VU); }
#endif

MF_INLINE V load_integers(const int16_t* source) {
  VS integers;
  __builtin_memcpy(&integers, source, sizeof(integers));
  return __builtin_convertvector(widen(integers), V);
}

// bfloat16 to nearest even; what is not a number stays so
MF_INLINE VH to_bf16(V v) {
#if defined(MF_LEVEL_PAIRS)
  return (VH)_mm512_cvtneps_pbh((__m512)v);
#else
  const VU bits = (VU)v;
  const VU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return __builtin_convertvector(v == v ? rounded : VU{} + 0x7fc0u, VH);
#endif
}

// Channels of a bfloat16 map that lie together: what a product reads at once of a position, at least a block
#if defined(MF_LEVEL_TILES)
constexpr int BF16_RUN = 32, BF16_STEP = 32;
#else
constexpr int BF16_RUN = BLOCK, BF16_STEP = 2;
#endif

MF_INLINE uint16_t* bf16_at(const Bfloat16Map& bf16, ptrdiff_t block, ptrdiff_t position) {
  return bf16.data + block * BLOCK / BF16_RUN * bf16.run + block * BLOCK % BF16_RUN + position * BF16_RUN;
}

// Vectors of COUNT positions from bf16_at(...) plus a lane on. The low part is what rounding took from the high one.
template <int COUNT>
MF_INLINE void store_bf16([[maybe_unused]] const Bfloat16Map& bf16, uint16_t* to, V (&values)[COUNT]) {
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    const VH bits = to_bf16(values[i]);
    __builtin_memcpy(to + i * BF16_RUN, &bits, sizeof(bits));
  }
#if defined(MF_LEVEL_TILES)
  if (bf16.parts == 1) return;
  to += bf16.part_size;
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    const VH bits = to_bf16(values[i] - (V)(widen(to_bf16(values[i])) << 16));
    __builtin_memcpy(to + i * BF16_RUN, &bits, sizeof(bits));
  }
#endif
}

MF_INLINE void store_bf16(const Bfloat16Map& bf16, uint16_t* to, V value) {
  V values[1] = {value};
  store_bf16(bf16, to, values);
}

// 2^x for x < 127; 0 where that would be denormal
MF_INLINE V exp2(V x) {
  const V clamped = maximum(x, broadcast(-126.0f));
  const V shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const V r = clamped - (shifted - 12582912.0f);
  V p = broadcast(1.5252734e-5f);  // Taylor of 2^r: the next term is below a rounding for |r| <= 1/2
  p = p * r + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const V power = (V)((VI)p + ((VI)shifted << 23));
  return x < -126.0f ? V{} : power;
}

// 1/2 x (1 + erf(x / sqrt 2)). The complementary error function of |x| is e^(-z^2) times a smooth function of
// 1 / (1 + 0.4 z); the polynomial is its least-squares fit on Chebyshev nodes for z in [0, 9], error 1e-7 relative.
MF_INLINE V gelu(V x) {
  constexpr float coefficients[] = {1.4221468e-2f, 2.8882222e-3f, -2.4384575e-1f, 5.1270068e-1f, -2.6273799e-1f,
                                    3.7129688e-1f, 1.4246505e-1f, 2.3873353e-1f,  2.2420704e-1f, 7.0882001e-5f};
  const V z = maximum(x, V{} - x) * 0.70710678118654752f;
  const V t = 1.0f / (z * 0.4f + 1.0f);
  V p = broadcast(coefficients[0]);
#pragma GCC unroll 9
  for (int i = 1; i < 10; ++i) p = p * t + coefficients[i];
  const V complement = exp2(z * z * float(-1.4426950408889634)) * p;
  return x * 0.5f * (x < V{} ? complement : 2.0f - complement);
}

MF_INLINE V hard_sigmoid(V x) { return clamp(x + 3.0f, 0.0f, 6.0f) / 6.0f; }

MF_INLINE V activate(V y, Act act) {
  switch (act) {
    case Act::relu6: return clamp(y, 0.0f, 6.0f);
    case Act::relu: return maximum(y, V{});
    case Act::hardswish: return y * hard_sigmoid(y);
    case Act::gelu: return gelu(y);
    case Act::hard_sigmoid: return hard_sigmoid(y);
    default: return y;
  }
}

// For one line of weights to come: it costs nothing beside the multiply-adds of a step
MF_INLINE void prefetch_line(Prefetch& prefetch) {
  if (prefetch.at < prefetch.end) {
    __builtin_prefetch(prefetch.at, 0, 2);
    prefetch.at += prefetch.step;
  }
}

MF_INLINE float sum_lanes(V v) {
  float total = 0;
  for (int i = 0; i < LANES; ++i) total += v[i];
  return total;
}

}  // namespace mf::engine::MF_LEVEL
