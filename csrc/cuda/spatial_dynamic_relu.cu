// Spatial dynamic ReLU on CUDA: the boundary. The kernels are in spatial_dynamic_relu_kernels.cuh.
#include "cuda/boundary.h"
#include "cuda/spatial_dynamic_relu_kernels.cuh"

namespace mf {
namespace {

KernelCounter forward_calls("spatial_dynamic_relu_fwd"), backward_calls("spatial_dynamic_relu_bwd");

Tensor spatial_dynamic_relu_fwd(Tensor x_in, Tensor theta_in, Tensor alpha_in) {
  check_map("spatial_dynamic_relu_fwd", "x", x_in).spatial_slopes(x_in, theta_in, alpha_in);
  const DeviceCall call(forward_calls, x_in);
  const FeatureMap x = feature_map(x_in), y = call.new_map(x, x.channels, x.height, x.width);
  const Tensor theta = as_contiguous(theta_in), alpha = as_contiguous(alpha_in);  // (B, M, 2C), (B, M, H, W)
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_spatial_dynamic_relu<T>(mutable_data<T>(y.tensor), data<T>(x.tensor), data<T>(theta), data<T>(alpha),
                                   x.batch, x.channels, x.positions(), theta.size(1), x.channels_last, call.stream());
  });
  call.check_launches();
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> spatial_dynamic_relu_bwd(Tensor d_y_in, Tensor x_in, Tensor theta_in,
                                                            Tensor alpha_in) {
  const Arguments arguments = check_map("spatial_dynamic_relu_bwd", "x", x_in);
  arguments.spatial_slopes(x_in, theta_in, alpha_in);
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const DeviceCall call(backward_calls, x_in);
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const FeatureMap d_x = call.new_map(x, x.channels, x.height, x.width);
  const Tensor theta = as_contiguous(theta_in), alpha = as_contiguous(alpha_in);  // (B, M, 2C), (B, M, H, W)
  const int64_t M = theta.size(1);
  const Tensor d_theta = call.new_tensor({x.batch, M, 2 * x.channels}, theta.scalar_type());
  const Tensor d_alpha = call.new_tensor({x.batch, M, x.height, x.width}, alpha.scalar_type());
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_spatial_dynamic_relu_backward<T>(mutable_data<T>(d_x.tensor), mutable_data<T>(d_theta),
                                            mutable_data<T>(d_alpha), data<T>(d_y.tensor), data<T>(x.tensor),
                                            data<T>(theta), data<T>(alpha), x.batch, x.channels, x.positions(), M,
                                            x.channels_last, call, call.stream());
  });
  call.check_launches();
  return {d_x.tensor, d_theta, d_alpha};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CUDA, m) {
  m.impl("spatial_dynamic_relu_fwd.native", TORCH_BOX(&mf::spatial_dynamic_relu_fwd));
  m.impl("spatial_dynamic_relu_bwd.native", TORCH_BOX(&mf::spatial_dynamic_relu_bwd));
}
