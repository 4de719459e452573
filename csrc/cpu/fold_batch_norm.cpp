// Running statistics of a BatchNorm folded into the convolution before it, on CPU: one pass over the weight.
//
// Legend: O output channels, J = values of one filter (inputs per group * K * K).
#define MF_EACH_SET_FILE "cpu/fold_batch_norm.cpp"
#include "cpu/boundary.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"

namespace mf::MF_ISA {

// folded[o][j] = weight[o][j] * scale[o]
template <class T>
void scale_filters(T* folded, const T* weight, const T* scale, int64_t O, int64_t J) {
  constexpr int lanes = LANES<T>;
  for (int64_t o = 0; o < O; ++o, folded += J, weight += J) {
    const Vector<T> factor = broadcast(scale[o]);
    int64_t j = 0;
    for (; j + lanes <= J; j += lanes) store(folded + j, load(weight + j) * factor);
    if (j < J) store(folded + j, load(weight + j, int(J - j)) * factor, int(J - j));
  }
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter fold_batch_norm_calls("fold_batch_norm");

std::tuple<Tensor, Tensor> fold_batch_norm(Tensor weight_in, Tensor norm_weight_in, Tensor norm_bias_in, Tensor mean_in,
                                           Tensor variance_in, double eps) {
  const Arguments arguments("fold_batch_norm", "weight", weight_in, cpu(), {ScalarType::Float, ScalarType::Double});
  arguments.rank("weight", weight_in, 4, "(O, I, K, K)");
  const int64_t outputs = weight_in.size(0);
  arguments.size("weight", {outputs, weight_in.size(1), weight_in.size(2), weight_in.size(3)});
  arguments.tensor("weight", weight_in, {outputs, weight_in.size(1), weight_in.size(2), weight_in.size(3)});
  arguments.tensor("norm_weight", norm_weight_in, {outputs});
  arguments.tensor("norm_bias", norm_bias_in, {outputs});
  arguments.tensor("mean", mean_in, {outputs});
  arguments.tensor("variance", variance_in, {outputs});
  const Tensor weight = as_contiguous(weight_in);  // (O, I, K, K), the others (O)
  const Tensor norm_weight = as_contiguous(norm_weight_in), norm_bias = as_contiguous(norm_bias_in);
  const Tensor mean = as_contiguous(mean_in), variance = as_contiguous(variance_in);
  const int64_t O = weight.size(0), J = weight.size(1) * weight.size(2) * weight.size(3);
  const Tensor folded = new_tensor({O, weight.size(1), weight.size(2), weight.size(3)}, weight.scalar_type());
  const Tensor bias = new_tensor({O}, weight.scalar_type());
  count_served(fold_batch_norm_calls);
  const auto fold = [&]<class T>() {
    const T *gamma = data<T>(norm_weight), *beta = data<T>(norm_bias), *mu = data<T>(mean), *var = data<T>(variance);
    T* bias_data = mutable_data<T>(bias);
    Scratch<T> scale(O);
    for (int64_t o = 0; o < O; ++o) {
      scale[o] = gamma[o] / std::sqrt(var[o] + T(eps));
      bias_data[o] = beta[o] - mu[o] * scale[o];
    }
    MF_CALL(scale_filters<T>(mutable_data<T>(folded), data<T>(weight), scale, O, J));
  };
  weight.scalar_type() == ScalarType::Double ? fold.template operator()<double>() : fold.template operator()<float>();
  return {folded, bias};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) { m.impl("fold_batch_norm.native", TORCH_BOX(&mf::fold_batch_norm)); }

#endif
