// Dynamic ReLU on CUDA: the boundary. The kernels are in dynamic_relu_kernels.cuh.
#include "cuda/boundary.h"
#include "cuda/dynamic_relu_kernels.cuh"

namespace mf {
namespace {

KernelCounter forward_calls("dynamic_relu_fwd"), backward_calls("dynamic_relu_bwd");

Tensor dynamic_relu_fwd(Tensor x_in, Tensor theta_in) {
  check_map("dynamic_relu_fwd", "x", x_in).tensor("theta", theta_in, {x_in.size(0), 2 * x_in.size(1)});
  const DeviceCall call(forward_calls, x_in);
  const FeatureMap x = feature_map(x_in), y = call.new_map(x, x.channels, x.height, x.width);
  const Tensor theta = as_contiguous(theta_in);  // (B, 2C)
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_dynamic_relu<T>(mutable_data<T>(y.tensor), data<T>(x.tensor), data<T>(theta), x.batch, x.channels,
                           x.positions(), x.channels_last, call.stream());
  });
  call.check_launches();
  return y.tensor;
}

std::tuple<Tensor, Tensor> dynamic_relu_bwd(Tensor d_y_in, Tensor x_in, Tensor theta_in) {
  const Arguments arguments = check_map("dynamic_relu_bwd", "x", x_in);
  arguments.tensor("theta", theta_in, {x_in.size(0), 2 * x_in.size(1)});
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const DeviceCall call(backward_calls, x_in);
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const FeatureMap d_x = call.new_map(x, x.channels, x.height, x.width);
  const Tensor theta = as_contiguous(theta_in);  // (B, 2C)
  const Tensor d_theta = call.new_tensor({x.batch, 2 * x.channels}, theta.scalar_type());
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_dynamic_relu_backward<T>(mutable_data<T>(d_x.tensor), mutable_data<T>(d_theta), data<T>(d_y.tensor),
                                    data<T>(x.tensor), data<T>(theta), x.batch, x.channels, x.positions(),
                                    x.channels_last, call, call.stream());
  });
  call.check_launches();
  return {d_x.tensor, d_theta};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CUDA, m) {
  m.impl("dynamic_relu_fwd.native", TORCH_BOX(&mf::dynamic_relu_fwd));
  m.impl("dynamic_relu_bwd.native", TORCH_BOX(&mf::dynamic_relu_bwd));
}
