// The scalar mathematics that the CPU and the CUDA kernels share. Source: mf_kernels/reference.py.
#pragma once

#ifdef __CUDACC__
#define MF_HOST_DEVICE __host__ __device__
#else
#define MF_HOST_DEVICE
#endif

namespace mf {

constexpr double LOG2_E = 1.4426950408889634074;
constexpr double LN_2 = 0.69314718055994530942;

constexpr int MAX_TOKENS = 8;  // that attention kernels are compiled for

enum class Activation { identity, relu6, hardswish, dynamic_relu };

// clamp(t + 3, 0, 6) / 6, written so that NaN stays NaN as in torch.clamp
template <class A>
MF_HOST_DEVICE inline A hard_sigmoid(A t) {
  const A shifted = t + A(3);
  return (shifted < A(0) ? A(0) : shifted > A(6) ? A(6) : shifted) / A(6);
}

// d_theta of a slope 2 hsig(theta) + const. torch.clamp passes the gradient at both ends; where the hard sigmoid is
// flat, and at NaN, it is 0 even if the slope's gradient is not finite
template <class A>
MF_HOST_DEVICE inline A slope_gradient(A d_slope, A theta) {
  return theta + A(3) >= A(0) && theta + A(3) <= A(6) ? d_slope * (A(2) * (A(1) / A(6))) : A(0);
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

// torch.maximum: NaN where either is
template <class A>
MF_HOST_DEVICE inline A larger_or_nan(A a, A b) {
  return a > b || a != a ? a : b;
}

// The share of a gradient that goes to the first of two lines: all where it is larger, half on a tie
template <class A>
MF_HOST_DEVICE inline A first_line_share(A line1, A line2) {
  return line1 > line2 ? A(1) : line1 < line2 ? A(0) : A(0.5);
}

// identity, clamp(z, 0, 6) or z clamp(z + 3, 0, 6) / 6; NaN stays NaN
template <class A>
MF_HOST_DEVICE inline A activate(A z, Activation activation) {
  if (activation == Activation::relu6) return z < A(0) ? A(0) : z > A(6) ? A(6) : z;
  if (activation == Activation::hardswish) return z * hard_sigmoid(z);
  return z;
}

// d_y times the slope of `activate`, with torch's corners. relu6: 1 between 0 and 6, 0 at both, beyond and at NaN.
// hardswish: 0 up to -3, z / 3 + 1/2 up to 3, then and at NaN 1. Where it is 0 an infinite d_y gives 0 too.
template <class A>
MF_HOST_DEVICE inline A activation_gradient(A d_y, A z, Activation activation) {
  if (activation == Activation::relu6) return z > A(0) && z < A(6) ? d_y : A(0);
  if (activation == Activation::hardswish) return z <= A(-3) ? A(0) : z < A(3) ? d_y * (z / A(3) + A(0.5)) : d_y;
  return d_y;
}

// Largest power of two that is at most n; n at least 1
MF_HOST_DEVICE constexpr int power_of_two_below(long long n) {
  int power = 1;
  while (2LL * power <= n && power < (1 << 20)) power *= 2;
  return power;
}

}  // namespace mf
