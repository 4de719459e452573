// The parameters of a block's token side, in the order of mf_kernels/ops/token_side.py.
#pragma once

#include <vector>

#include "cpu/boundary.h"

namespace mf {

struct LinearLayer {
  const float* weight;  // [outputs][inputs]
  const float* bias;    // [outputs]
  int64_t outputs, inputs;
};

struct NormLayer {
  const float* weight;  // [D]
  const float* bias;    // [D]
  float eps;
};

struct SlopeLayers {
  LinearLayer reduce, expand;
};

inline int64_t padded_inputs(int64_t inputs) { return ceil_div(inputs, 16) * 16; }

class TokenSideParameters {
  std::vector<Tensor> held_;  // contiguous; keeps what the pointers below point to
  size_t next_ = 0;

  void check(bool fits, const char* expected) const {
    STD_TORCH_CHECK(fits, "token_side: parameters[", next_, "] and [", next_ + 1, "]: expected float32 on CPU, ",
                    expected);
  }
  static bool is_float(const Tensor& t) {
    return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_cpu();
  }
  // outputs: how many there must be, or 0 for any
  LinearLayer linear(int64_t outputs, int64_t inputs) {
    const Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    check(is_float(weight) && is_float(bias) && weight.dim() == 2 && bias.dim() == 1 && weight.size(1) == inputs &&
              weight.size(0) == bias.size(0) && weight.size(0) > 0 && (outputs == 0 || weight.size(0) == outputs),
          "a weight and a bias of the sizes that tokens (B, M, D) and gathered (B, M, C) imply");
    next_ += 2;
    return {data<float>(weight), data<float>(bias), weight.size(0), weight.size(1)};
  }
  NormLayer norm(int64_t width, float eps) {
    const Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    check(is_float(weight) && is_float(bias) && weight.dim() == 1 && bias.dim() == 1 && weight.size(0) == width &&
              bias.size(0) == width,
          "a LayerNorm's weight and bias (D)");
    next_ += 2;
    return {data<float>(weight), data<float>(bias), eps};
  }
  static std::vector<Tensor> contiguous(const std::vector<Tensor>& parameters) {
    STD_TORCH_CHECK(parameters.size() >= 22 && parameters.size() % 4 == 2,
                    "token_side: parameters: expected 22 tensors and 4 for each dynamic ReLU, got ", parameters.size());
    std::vector<Tensor> held;
    for (const Tensor& t : parameters) held.push_back(as_contiguous(t));
    return held;
  }

 public:
  LinearLayer gate, bridge;
  NormLayer bridge_norm;
  LinearLayer query, mix;
  NormLayer attention_norm;
  LinearLayer expand, contract;
  NormLayer ffn_norm;
  LinearLayer key, value;
  std::vector<SlopeLayers> slopes;

  // D token width, C channels of what was gathered
  TokenSideParameters(const std::vector<Tensor>& parameters, int64_t D, int64_t C, float eps)
      : held_(contiguous(parameters)), gate(linear(C, D)), bridge(linear(D, C)), bridge_norm(norm(D, eps)),
        query(linear(D, D)), mix(linear(D, D)), attention_norm(norm(D, eps)), expand(linear(2 * D, D)),
        contract(linear(D, 2 * D)), ffn_norm(norm(D, eps)), key(linear(0, D)), value(linear(key.outputs, D)) {
    while (next_ < held_.size()) {
      const LinearLayer reduce = linear(D / 4, D);
      slopes.push_back({reduce, linear(0, reduce.outputs)});
    }
  }
};

}  // namespace mf
