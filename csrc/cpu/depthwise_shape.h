// What a depthwise convolution is, read off its arguments once: sides, window, activation.
#pragma once

#include "common/math.h"
#include "cpu/boundary.h"

namespace mf {

// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride.
struct DepthwiseShape {
  static constexpr int64_t STRIP = 32;                // output rows of one forward task
  static constexpr int64_t STRIP_BYTES = 512 * 1024;  // what a backward strip may keep in the second-level cache
  static constexpr int64_t BACKWARD_PARTS = 32;       // parts of the batch whose sums are added at the end
  int64_t B, C, O, mult, H, W, OH, OW, K, S;

  DepthwiseShape(const FeatureMap& x, const Tensor& weight, int64_t stride)
      : B(x.batch), C(x.channels), O(weight.size(0)), mult(O / C), H(x.height), W(x.width), OH((H - 1) / stride + 1),
        OW((W - 1) / stride + 1), K(weight.size(2)), S(stride) {}

  int64_t forward_strips() const { return ceil_div(OH, STRIP); }
  int64_t pad() const { return K / 2; }

  // Room for the filters of all blocks, one vector for each tap and one for the bias, in any instruction set
  template <class A>
  int64_t packed_filters() const {
    constexpr int64_t most_lanes = 64 / sizeof(A);
    return ceil_div(O, most_lanes) * most_lanes * (K * K + 1);
  }

  // Samples of one backward task: as few parts as keep the threads busy, since each has sums for every filter
  int64_t backward_samples() const { return std::max<int64_t>(1, ceil_div(B, BACKWARD_PARTS)); }

  // Output rows of one backward strip, whose g, x and d_x rows hold `vector_bytes` at every column
  int64_t backward_strip(int64_t vector_bytes) const {
    const int64_t bytes_per_row = (OW + 2 * S * W) * vector_bytes;
    return std::clamp<int64_t>(STRIP_BYTES / bytes_per_row, 2, OH < 2 ? 2 : OH);
  }
};

inline Activation activation_of(const std::string& name) {
  if (name == "hardswish") return Activation::hardswish;
  if (name == "relu6") return Activation::relu6;
  if (name != "identity") {
    refuse("depthwise_conv2d", "activation", "hardswish, relu6 or identity, got ", name.substr(0, 40));
  }
  return Activation::identity;
}

// Calls f.template operator()<K, S>()
template <class F>
void with_window(const DepthwiseShape& shape, const F& f) {
  if (shape.K == 3) return shape.S == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  return shape.S == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

}  // namespace mf
