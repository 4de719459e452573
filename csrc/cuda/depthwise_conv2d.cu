// Depthwise convolution with its activation on CUDA: the boundary. The kernels are in depthwise_conv2d_kernels.cuh.
#include <optional>
#include <string>

#include "cuda/boundary.h"
#include "cuda/depthwise_conv2d_kernels.cuh"

namespace mf {
namespace {

KernelCounter forward_calls("depthwise_conv2d_fwd"), backward_calls("depthwise_conv2d_bwd");

Activation activation_of(const std::string& name) {
  if (name == "hardswish") return Activation::hardswish;
  if (name == "relu6") return Activation::relu6;
  if (name != "identity") {
    refuse("depthwise_conv2d", "activation", "hardswish, relu6 or identity, got ", name.substr(0, 40));
  }
  return Activation::identity;
}

DepthwiseShape shape_of(const FeatureMap& x, const Tensor& weight, int64_t stride) {  // weight (O, 1, K, K)
  return depthwise_shape(x.batch, x.channels, x.height, x.width, weight.size(0), weight.size(2), stride,
                         x.channels_last);
}

Tensor depthwise_conv2d_fwd(Tensor x_in, Tensor weight_in, std::optional<Tensor> bias_in, int64_t stride,
                            std::string name) {
  check_map("depthwise_conv2d_fwd", "x", x_in).depthwise(x_in, weight_in, bias_in, stride);
  const Activation activation = activation_of(name);
  const DeviceCall call(forward_calls, x_in);
  const FeatureMap x = feature_map(x_in);
  const Tensor weight = as_contiguous(weight_in);                  // (O, 1, K, K)
  const Tensor bias = bias_in ? as_contiguous(*bias_in) : weight;  // (O), else not read
  const DepthwiseShape s = shape_of(x, weight, stride);
  const FeatureMap y = call.new_map(x, s.O, s.OH, s.OW);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_depthwise_conv2d<T>(mutable_data<T>(y.tensor), data<T>(x.tensor), data<T>(weight),
                               bias_in ? data<T>(bias) : nullptr, s, activation, call.stream());
  });
  call.check_launches();
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(Tensor d_y_in, Tensor x_in, Tensor weight_in,
                                                        std::optional<Tensor> bias_in, int64_t stride,
                                                        std::string name) {
  const Arguments arguments = check_map("depthwise_conv2d_bwd", "x", x_in);
  arguments.depthwise(x_in, weight_in, bias_in, stride);
  arguments.tensor("d_y", d_y_in,
                   {x_in.size(0), weight_in.size(0), ceil_div(x_in.size(2), stride), ceil_div(x_in.size(3), stride)});
  const Activation activation = activation_of(name);
  const DeviceCall call(backward_calls, x_in);
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor weight = as_contiguous(weight_in);                  // (O, 1, K, K)
  const Tensor bias = bias_in ? as_contiguous(*bias_in) : weight;  // (O), else not read
  const DepthwiseShape s = shape_of(x, weight, stride);
  const FeatureMap d_x = call.new_map(x, s.C, s.H, s.W);
  const Tensor d_weight = call.new_tensor({s.O, 1, s.K, s.K}, weight.scalar_type());
  const Tensor d_bias = call.new_tensor({s.O}, weight.scalar_type());
  // The gradient before the activation, in a map of its own where there is one
  const FeatureMap gradient = activation == Activation::identity ? d_y : call.new_map(x, s.O, s.OH, s.OW);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_depthwise_conv2d_backward<T>(mutable_data<T>(d_x.tensor), mutable_data<T>(d_weight), mutable_data<T>(d_bias),
                                        data<T>(d_y.tensor), data<T>(x.tensor), data<T>(weight),
                                        bias_in ? data<T>(bias) : nullptr, mutable_data<T>(gradient.tensor), s,
                                        activation, call, call.stream());
  });
  call.check_launches();
  return {d_x.tensor, d_weight, d_bias};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CUDA, m) {
  m.impl("depthwise_conv2d_fwd.native", TORCH_BOX(&mf::depthwise_conv2d_fwd));
  m.impl("depthwise_conv2d_bwd.native", TORCH_BOX(&mf::depthwise_conv2d_bwd));
}
