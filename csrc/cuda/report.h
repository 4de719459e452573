// How often each kernel of this library ran; read by mf_kernels.record_kernels.
#pragma once

namespace mf {

enum class Kernel : int {
  mobile_to_former_fwd,
  mobile_to_former_bwd,
  former_to_mobile_fwd,
  former_to_mobile_bwd,
  dynamic_relu_fwd,
  dynamic_relu_bwd,
  depthwise_conv2d_fwd,
  depthwise_conv2d_bwd,
};
constexpr int KERNEL_COUNT = 8;

// Counts one call on the host; the device counts nothing.
void count_served(Kernel kernel);

}  // namespace mf
