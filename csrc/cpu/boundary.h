// Between the dispatcher's tensors and the CPU kernels' pointers: dtypes, allocation, scratch memory.
#pragma once

#include "common/check.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>

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

inline float to_accumulator(float value) { return value; }
inline double to_accumulator(double value) { return value; }
inline float to_accumulator(bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float wide;
  __builtin_memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline void from_accumulator(float& target, float value) { target = value; }
inline void from_accumulator(double& target, double value) { target = value; }
inline void from_accumulator(bfloat16& target, float value) {  // to nearest even; NaN stays NaN
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  target.bits = value == value ? uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16) : 0x7fc0;
}

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

// Calls f.template operator()<T>() with the C++ type of a dtype that the kernels are written for.
template <class F>
void with_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float: return f.template operator()<float>();
    case torch::headeronly::ScalarType::Double: return f.template operator()<double>();
    case torch::headeronly::ScalarType::BFloat16: return f.template operator()<bfloat16>();
    default: STD_TORCH_CHECK(false, "mf_kernels on CPU: expected float32, float64 or bfloat16");
  }
}

inline torch::headeronly::ScalarType accumulator_dtype(const Tensor& t) {
  return t.scalar_type() == torch::headeronly::ScalarType::Double ? torch::headeronly::ScalarType::Double
                                                                  : torch::headeronly::ScalarType::Float;
}

inline Place cpu() { return {aoti_torch_device_type_cpu(), 0}; }

// The arguments of an operator whose first one is a feature map; checks that one
inline Arguments check_map(const char* op, const char* name, const Tensor& x) {
  const Arguments arguments(op, name, x, cpu(), {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16});
  arguments.feature_map(name, x);
  return arguments;
}

inline FeatureMap new_map(const FeatureMap& like, int64_t channels, int64_t height, int64_t width) {
  return new_map(like, channels, height, width, cpu());
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  return new_tensor(sizes, dtype, cpu());
}

// Uninitialised memory of one task, aligned to a cache line.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<A*>(std::aligned_alloc(64, (count * sizeof(A) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator A*() const { return data_; }

 private:
  A* data_;
};

}  // namespace mf
