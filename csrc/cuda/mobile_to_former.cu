// Mobile -> Former on CUDA: the boundary. The kernels are in mobile_to_former_kernels.cuh.
#include "cuda/boundary.h"
#include "cuda/mobile_to_former_kernels.cuh"

namespace mf {
namespace {

KernelCounter forward_calls("mobile_to_former_fwd"), backward_calls("mobile_to_former_bwd");

AttentionShape shape_of(const FeatureMap& x, const Tensor& q, int64_t num_heads) {  // q (B, M, C)
  return attention_shape(x.batch, x.channels, x.positions(), q.size(1), num_heads, x.channels_last);
}

std::tuple<Tensor, Tensor> mobile_to_former_fwd(Tensor x_in, Tensor q_in, int64_t num_heads) {
  check_map("mobile_to_former_fwd", "x", x_in).tokens("q", q_in, x_in, num_heads);
  const DeviceCall call(forward_calls, x_in);
  const FeatureMap x = feature_map(x_in);
  const Tensor q = as_contiguous(q_in);  // (B, M, C)
  const AttentionShape shape = shape_of(x, q, num_heads);
  const Tensor out = call.new_tensor({shape.B, shape.M, shape.C}, q.scalar_type());
  const Tensor log_sum_exp = call.new_tensor({shape.B, shape.N, shape.M}, torch::headeronly::ScalarType::Float);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_mobile_to_former<T>(mutable_data<T>(out), mutable_data<float>(log_sum_exp), data<T>(x.tensor), data<T>(q),
                               shape, call, call.stream());
  });
  call.check_launches();
  return {out, log_sum_exp};
}

std::tuple<Tensor, Tensor> mobile_to_former_bwd(Tensor d_out_in, Tensor x_in, Tensor q_in, Tensor out_in,
                                                Tensor log_sum_exp_in, int64_t num_heads) {
  const Arguments arguments = check_map("mobile_to_former_bwd", "x", x_in);
  arguments.tokens("q", q_in, x_in, num_heads);
  arguments.tensor("d_out", d_out_in, {q_in.size(0), q_in.size(1), q_in.size(2)});
  arguments.tensor("out", out_in, {q_in.size(0), q_in.size(1), q_in.size(2)});
  arguments.tensor("statistics", log_sum_exp_in, {q_in.size(0), num_heads, q_in.size(1)}, ScalarType::Float);
  const DeviceCall call(backward_calls, x_in);
  const FeatureMap x = feature_map(x_in), d_x = call.new_map(x, x.channels, x.height, x.width);
  const Tensor q = as_contiguous(q_in), d_out = as_contiguous(d_out_in), out = as_contiguous(out_in);  // (B, M, C)
  const Tensor log_sum_exp = as_contiguous(log_sum_exp_in);                                            // (B, N, M)
  const AttentionShape shape = shape_of(x, q, num_heads);
  const Tensor d_q = call.new_tensor({shape.B, shape.M, shape.C}, q.scalar_type());
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    launch_mobile_to_former_backward<T>(mutable_data<T>(d_x.tensor), mutable_data<T>(d_q), data<T>(d_out),
                                        data<T>(x.tensor), data<T>(q), data<T>(out), data<float>(log_sum_exp), shape,
                                        call, call.stream());
  });
  call.check_launches();
  return {d_x.tensor, d_q};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CUDA, m) {
  m.impl("mobile_to_former_fwd.native", TORCH_BOX(&mf::mobile_to_former_fwd));
  m.impl("mobile_to_former_bwd.native", TORCH_BOX(&mf::mobile_to_former_bwd));
}
