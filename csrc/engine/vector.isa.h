// One vector of floats of the instruction set that is being compiled, and maps of bfloat16. No include guard: once per
// set, in its namespace, after common/vector.isa.h.

namespace mf::engine::MF_ISA {

using namespace mf::MF_ISA;  // common/vector.isa.h of this set

constexpr int LANES = mf::MF_ISA::LANES<float>;
constexpr int PER_BLOCK = BLOCK / LANES;  // vectors of a block

using V = Vector<float>;
using VI = IntegerVector<float>;

MF_INLINE V clamp(V x, float low, float high) { return minimum(maximum(x, broadcast(low)), broadcast(high)); }

MF_INLINE V load_integers(const int16_t* source) {
  HalfIntegers integers;
  __builtin_memcpy(&integers, source, sizeof(integers));
  return __builtin_convertvector(widen(integers), V);
}

// Channels of a bfloat16 map that lie together: what a product reads at once of a position, at least a block
#if defined(MF_ISA_TILES)
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
    const HalfWords bits = to_bf16(values[i]);
    __builtin_memcpy(to + i * BF16_RUN, &bits, sizeof(bits));
  }
#if defined(MF_ISA_TILES)
  if (bf16.parts == 1) return;
  to += bf16.part_size;
#pragma GCC unroll 16
  for (int i = 0; i < COUNT; ++i) {
    const HalfWords bits = to_bf16(values[i] - from_bf16(to_bf16(values[i])));
    __builtin_memcpy(to + i * BF16_RUN, &bits, sizeof(bits));
  }
#endif
}

MF_INLINE void store_bf16(const Bfloat16Map& bf16, uint16_t* to, V value) {
  V values[1] = {value};
  store_bf16(bf16, to, values);
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

}  // namespace mf::engine::MF_ISA
