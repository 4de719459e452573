// Between the dispatcher's tensors and the CPU kernels' pointers: dtypes, allocation, scratch memory.
#pragma once

#include "common/numbers.h"
#include "tensor/check.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>

namespace mf {

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
