// A tensor as both the CPU and the CUDA kernels see it: how a feature map lies in memory, and new memory for results.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

namespace mf {

using torch::stable::Tensor;

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

struct Place {  // where new memory lies
  int32_t device_type, device_index;
};

// Uninitialised memory. The shim is called directly: `torch::stable::empty` looks its operator up by name each time.
inline Tensor new_strided(const int64_t* sizes, const int64_t* strides, int64_t dims,
                          torch::headeronly::ScalarType dtype, Place place) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), place.device_type,
      place.device_index, &handle));
  return Tensor(handle);
}

// Uninitialised (B, C, H, W) in the dtype and layout of `like`.
inline FeatureMap new_map(const FeatureMap& like, int64_t channels, int64_t height, int64_t width, Place place) {
  const int64_t sizes[] = {like.batch, channels, height, width};
  const int64_t area = height * width;
  const int64_t channels_last[] = {channels * area, 1, width * channels, channels};
  const int64_t contiguous[] = {channels * area, area, width, 1};
  const int64_t* strides = like.channels_last ? channels_last : contiguous;
  return describe(new_strided(sizes, strides, 4, like.tensor.scalar_type(), place), like.channels_last);
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype, Place place) {
  int64_t strides[4], stride = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes.begin()[i], 1);
  }
  return new_strided(sizes.begin(), strides, int64_t(sizes.size()), dtype, place);
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mf
