// The numbers that kernels for the CPU store and the ones they compute in. No vectors: compiled once.
#pragma once

#include <cstdint>

namespace mf {

struct bfloat16 {
  uint16_t bits;
};

template <class T>
struct AccumulatorOf {
  using type = T;
};
template <>
struct AccumulatorOf<bfloat16> {
  using type = float;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;  // what a kernel computes in

inline float from_bf16(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint16_t to_bf16(float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return value == value ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

inline float to_accumulator(float value) { return value; }
inline double to_accumulator(double value) { return value; }
inline float to_accumulator(bfloat16 value) { return from_bf16(value.bits); }

inline void from_accumulator(float& target, float value) { target = value; }
inline void from_accumulator(double& target, double value) { target = value; }
inline void from_accumulator(bfloat16& target, float value) { target.bits = to_bf16(value); }

template <int... I>
struct Integers {};
template <int N, int... I>
struct MakeIntegers : MakeIntegers<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIntegers<0, I...> {
  using type = Integers<I...>;
};
template <int N>
using IntegerSequence = typename MakeIntegers<N>::type;  // std::integer_sequence, kept out of the per-ISA code

}  // namespace mf
