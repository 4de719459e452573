// The scalar mathematics that the CPU and the CUDA kernels share. Source: mf_kernels/reference.py.
#pragma once

#ifdef __CUDACC__
#define MF_HOST_DEVICE __host__ __device__
#else
#define MF_HOST_DEVICE
#endif

namespace mf {

constexpr double LOG2_E = 1.4426950408889634074;

enum class Activation { identity, relu6, hardswish, dynamic_relu };

// clamp(t + 3, 0, 6) / 6, written so that NaN stays NaN as in torch.clamp
template <class A>
MF_HOST_DEVICE inline A hard_sigmoid(A t) {
  const A shifted = t + A(3);
  return (shifted < A(0) ? A(0) : shifted > A(6) ? A(6) : shifted) / A(6);
}

// Slope of hard_sigmoid; torch.clamp passes the gradient at both ends
template <class A>
MF_HOST_DEVICE inline A hard_sigmoid_slope(A t) {
  return t + A(3) >= A(0) && t + A(3) <= A(6) ? A(1) / A(6) : A(0);
}

// a1 = 2 hsig(theta1) in [0, 2]
template <class A>
MF_HOST_DEVICE inline A dynamic_relu_slope1(A theta1) {
  return A(2) * hard_sigmoid(theta1);
}

// a2 = 2 hsig(theta2) - 1 in [-1, 1]
template <class A>
MF_HOST_DEVICE inline A dynamic_relu_slope2(A theta2) {
  return A(2) * hard_sigmoid(theta2) - A(1);
}

}  // namespace mf
