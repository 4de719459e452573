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

  LinearLayer linear() {
    const Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    next_ += 2;
    return {data<float>(weight), data<float>(bias), weight.size(0), weight.size(1)};
  }
  NormLayer norm(float eps) {
    const Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    next_ += 2;
    return {data<float>(weight), data<float>(bias), eps};
  }
  static std::vector<Tensor> contiguous(const std::vector<Tensor>& parameters) {
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

  TokenSideParameters(const std::vector<Tensor>& parameters, float eps)
      : held_(contiguous(parameters)), gate(linear()), bridge(linear()), bridge_norm(norm(eps)), query(linear()),
        mix(linear()), attention_norm(norm(eps)), expand(linear()), contract(linear()), ffn_norm(norm(eps)),
        key(linear()), value(linear()) {
    while (next_ < held_.size()) {
      const LinearLayer reduce = linear();
      slopes.push_back({reduce, linear()});
    }
  }
};

}  // namespace mf
