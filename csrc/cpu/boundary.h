// Between the dispatcher's tensors and the kernels' pointers: layouts, dtypes, allocation, scratch memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdlib>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <algorithm>

namespace mf {

using torch::stable::Tensor;

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

// A feature map (B, C, H, W) and the distance, in elements, between neighbours along each axis.
// Positions l = h * W + w are one axis: both layouts that the kernels read lay them out evenly.
struct FeatureMap {
  Tensor tensor;  // (B, C, H, W), contiguous or channels_last
  int64_t batch, channels, height, width;
  bool channels_last;
  int64_t positions() const { return height * width; }
  int64_t batch_stride() const { return channels * positions(); }
  int64_t channel_stride() const { return channels_last ? 1 : positions(); }
  int64_t position_stride() const { return channels_last ? channels : 1; }
  int64_t offset(int64_t b, int64_t c, int64_t l) const {
    return b * batch_stride() + c * channel_stride() + l * position_stride();
  }
};

inline bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  for (int dim : {1, 3, 2, 0}) {
    if (x.size(dim) != 1 && x.stride(dim) != expected) return false;
    expected *= x.size(dim);
  }
  return true;
}

inline FeatureMap describe(const Tensor& x, bool channels_last) {
  return {x, x.size(0), x.size(1), x.size(2), x.size(3), channels_last};
}

// The map as it lies when it is contiguous or channels_last; a contiguous copy of any other strides.
inline FeatureMap feature_map(const Tensor& x) {
  if (x.is_contiguous()) return describe(x, false);
  if (is_channels_last(x)) return describe(x, true);
  return describe(torch::stable::contiguous(x), false);
}

// The map in the layout of another one, copied where it lies differently: gradients come in any layout.
inline FeatureMap feature_map_as(const Tensor& x, bool channels_last) {
  if (channels_last ? is_channels_last(x) : x.is_contiguous()) return describe(x, channels_last);
  const auto format =
      channels_last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return describe(torch::stable::contiguous(x, format), channels_last);
}

// Uninitialised CPU memory. The shim is called directly: `torch::stable::empty` looks its operator up by name each time.
inline Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dims, torch::headeronly::ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Uninitialised (B, C, H, W) in the dtype and layout of `like`.
inline FeatureMap new_map(const FeatureMap& like, int64_t channels, int64_t height, int64_t width) {
  const int64_t sizes[] = {like.batch, channels, height, width};
  const int64_t area = height * width;
  const int64_t channels_last[] = {channels * area, 1, width * channels, channels};
  const int64_t contiguous[] = {channels * area, area, width, 1};
  return describe(new_strided(sizes, like.channels_last ? channels_last : contiguous, 4, like.tensor.scalar_type()),
                  like.channels_last);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) {
  int64_t strides[4], stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return new_strided(sizes.begin(), strides, int64_t(sizes.size()), dtype);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mf
