// Former -> Mobile on CUDA: the boundary. The kernels are in former_to_mobile_kernels.cuh.
#include "cuda/boundary.h"
#include "cuda/former_to_mobile_kernels.cuh"

namespace mf {
namespace {

KernelCounter forward_calls("former_to_mobile_fwd"), backward_calls("former_to_mobile_bwd");

Arguments check(const char* op, const Tensor& x, const Tensor& k, const Tensor& v, int64_t num_heads) {
  const Arguments arguments = check_map(op, "x", x);
  arguments.tokens("k", k, x, num_heads);
  arguments.tensor("v", v, {k.size(0), k.size(1), k.size(2)});
  return arguments;
}

AttentionShape shape_of(const FeatureMap& x, const Tensor& tokens, int64_t num_heads) {  // tokens (B, M, C)
  return attention_shape(x.batch, x.channels, x.positions(), tokens.size(1), num_heads, x.channels_last);
}

Tensor former_to_mobile_fwd(Tensor x_in, Tensor k_in, Tensor v_in, int64_t num_heads) {
  check("former_to_mobile_fwd", x_in, k_in, v_in, num_heads);
  const DeviceCall call(forward_calls, x_in);
  const FeatureMap x = feature_map(x_in), y = call.new_map(x, x.channels, x.height, x.width);
  const Tensor k = as_contiguous(k_in), v = as_contiguous(v_in);  // (B, M, C)
  const AttentionShape shape = shape_of(x, k, num_heads);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_former_to_mobile<T>(mutable_data<T>(y.tensor), data<T>(x.tensor), data<T>(k), data<T>(v), shape,
                               call.stream());
  });
  call.check_launches();
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> former_to_mobile_bwd(Tensor d_y_in, Tensor x_in, Tensor k_in, Tensor v_in,
                                                        int64_t num_heads) {
  const Arguments arguments = check("former_to_mobile_bwd", x_in, k_in, v_in, num_heads);
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const DeviceCall call(backward_calls, x_in);
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const FeatureMap d_x = call.new_map(x, x.channels, x.height, x.width);
  const Tensor k = as_contiguous(k_in), v = as_contiguous(v_in);  // (B, M, C)
  const AttentionShape shape = shape_of(x, k, num_heads);
  const Tensor d_k = call.new_tensor({shape.B, shape.M, shape.C}, k.scalar_type());
  const Tensor d_v = call.new_tensor({shape.B, shape.M, shape.C}, k.scalar_type());
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_former_to_mobile_backward<T>(mutable_data<T>(d_x.tensor), mutable_data<T>(d_k), mutable_data<T>(d_v),
                                        data<T>(d_y.tensor), data<T>(x.tensor), data<T>(k), data<T>(v), shape, call,
                                        call.stream());
  });
  call.check_launches();
  return {d_x.tensor, d_k, d_v};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CUDA, m) {
  m.impl("former_to_mobile_fwd.native", TORCH_BOX(&mf::former_to_mobile_fwd));
  m.impl("former_to_mobile_bwd.native", TORCH_BOX(&mf::former_to_mobile_bwd));
}
