// The slopes of a dynamic ReLU, as its own kernels and the depthwise epilogue take them.
#pragma once

#include "common/math.h"
#include "cpu/boundary.h"

namespace mf {

// slopes[0][b][c] = a1, slopes[1][b][c] = a2, from theta (B, 2C)
template <class T>
void take_slopes(Accumulator<T>* slopes, const T* theta, int64_t B, int64_t C) {
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      slopes[b * C + c] = dynamic_relu_slope1(to_accumulator(theta[b * 2 * C + c]));
      slopes[(B + b) * C + c] = dynamic_relu_slope2(to_accumulator(theta[b * 2 * C + C + c]));
    }
  }
}

// slopes[r] = a1 of all channels, then a2, from theta (rows, 2C)
template <class T>
void take_token_slopes(Accumulator<T>* slopes, const T* theta, int64_t rows, int64_t C) {
  for (int64_t r = 0; r < rows; ++r, slopes += 2 * C, theta += 2 * C) {
    for (int64_t c = 0; c < C; ++c) {
      slopes[c] = dynamic_relu_slope1(to_accumulator(theta[c]));
      slopes[C + c] = dynamic_relu_slope2(to_accumulator(theta[C + c]));
    }
  }
}

}  // namespace mf
