// The sides of a depthwise convolution, read off its tensors once.
#pragma once

#include "cpu/boundary.h"

namespace mf {

// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride.
struct DepthwiseShape {
  static constexpr int64_t STRIP = 32;                // output rows of one forward task
  static constexpr int64_t STRIP_BYTES = 512 * 1024;  // what a backward strip may keep in the second-level cache
  int64_t B, C, O, mult, H, W, OH, OW, K, S;

  DepthwiseShape(const FeatureMap& x, const Tensor& weight, int64_t stride)
      : B(x.batch), C(x.channels), O(weight.size(0)), mult(O / C), H(x.height), W(x.width), OH((H - 1) / stride + 1),
        OW((W - 1) / stride + 1), K(weight.size(2)), S(stride) {}

  int64_t forward_strips() const { return ceil_div(OH, STRIP); }
  int64_t pad() const { return K / 2; }

  // Output rows of one backward strip, whose g, x and d_x rows hold `vector_bytes` at every column
  int64_t backward_strip(int64_t vector_bytes) const {
    const int64_t bytes_per_row = (OW + 2 * S * W) * vector_bytes;
    return std::clamp<int64_t>(STRIP_BYTES / bytes_per_row, 2, OH < 2 ? 2 : OH);
  }
};

}  // namespace mf
