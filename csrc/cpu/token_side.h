// The parameters of a block's token side, under the names and in the order of TokenSideLayers in
// mf_kernels/ops/token_side.py.
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

  const Arguments& arguments_;

  // outputs: how many there must be, or 0 for any
  LinearLayer linear(int64_t outputs, int64_t inputs) {
    Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    const int64_t place = int64_t(next_);
    const Argument name("parameters", place);
    arguments_.rank(name, weight, 2, "a weight (outputs, inputs)");
    if (outputs == 0) outputs = std::max<int64_t>(weight.size(0), 1);
    arguments_.size(name, {outputs, inputs, 64});
    arguments_.tensor(name, weight, {outputs, inputs});
    arguments_.tensor({"parameters", place + 1}, bias, {outputs});
    weight = as_contiguous(weight), bias = as_contiguous(bias);
    next_ += 2;
    return {data<float>(weight), data<float>(bias), weight.size(0), weight.size(1)};
  }
  NormLayer norm(int64_t width, float eps) {
    Tensor &weight = held_[next_], &bias = held_[next_ + 1];
    arguments_.tensor({"parameters", int64_t(next_)}, weight, {width});
    arguments_.tensor({"parameters", int64_t(next_) + 1}, bias, {width});
    weight = as_contiguous(weight), bias = as_contiguous(bias);
    next_ += 2;
    return {data<float>(weight), data<float>(bias), eps};
  }
  static std::vector<Tensor> counted(std::vector<Tensor> parameters) {
    if (parameters.size() < 22 || parameters.size() % 4 != 2) {
      refuse("token_side", "parameters", "22 tensors and 4 for each dynamic ReLU, got ", parameters.size());
    }
    return parameters;
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
  TokenSideParameters(std::vector<Tensor> parameters, const Arguments& arguments, int64_t D, int64_t C, float eps)
      : held_(counted(std::move(parameters))), arguments_(arguments), gate(linear(C, D)), bridge(linear(D, C)),
        bridge_norm(norm(D, eps)), query(linear(D, D)), mix(linear(D, D)), attention_norm(norm(D, eps)),
        expand(linear(2 * D, D)), contract(linear(D, 2 * D)), ffn_norm(norm(D, eps)), key(linear(0, D)),
        value(linear(key.outputs, D)) {
    while (next_ < held_.size()) {
      const LinearLayer reduce = linear(D / 4, D);
      slopes.push_back({reduce, linear(0, reduce.outputs)});
    }
  }
};

}  // namespace mf
