// A program for the sanitizers: every kernel, forward and backward, on one small shape of each branch, in float32.
// The numbers are compared with loops in double; a gradient through its product with a random direction, which must be
// what the loops change by along it. Prints what differs; the sanitizer prints the rest.
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "interface.h"
#include "cuda/mobile_to_former_kernels.cuh"
#include "cuda/dynamic_relu_kernels.cuh"
#ifndef MF_PLANTED  // the two kernels that carry a planted fault are enough to show that it is seen
#include "cuda/former_to_mobile_kernels.cuh"
#include "cuda/spatial_dynamic_relu_kernels.cuh"
#include "cuda/depthwise_conv2d_kernels.cuh"
#endif

using Floats = std::vector<float>;
using Doubles = std::vector<double>;
using Arguments = std::vector<Doubles>;
using mf_emulator::Memory;

namespace {

std::mt19937 generator(1);
int failures = 0;

Floats random_values(size_t count, float spread = 1) {
  std::normal_distribution<float> normal(0, spread);
  Floats values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

double dot(const Doubles& a, const Floats& b) {
  double total = 0;
  for (size_t i = 0; i < a.size(); ++i) total += a[i] * b[i];
  return total;
}

// Compares outputs, and gradients along one random direction each
void compare(const char* name, const std::function<Doubles(const Arguments&)>& loops,
             const std::vector<Floats>& arguments, const Floats& output, const Floats& d_output,
             const std::vector<Floats>& gradients) {
  Arguments wide;
  for (const Floats& argument : arguments) wide.emplace_back(argument.begin(), argument.end());
  const Doubles truth = loops(wide);
  double worst = 0;
  for (size_t i = 0; i < truth.size(); ++i) worst = std::max(worst, std::abs(truth[i] - output[i]));
  bool good = worst < 1e-4 && output.size() == truth.size();
  for (size_t k = 0; k < arguments.size(); ++k) {
    const Floats direction = random_values(arguments[k].size());
    const double step = 1e-5;
    Arguments ahead = wide, behind = wide;
    double along = 0, size = 1e-3;
    for (size_t i = 0; i < direction.size(); ++i) {
      ahead[k][i] += step * direction[i], behind[k][i] -= step * direction[i];
      along += double(gradients[k][i]) * direction[i], size += std::abs(double(gradients[k][i]) * direction[i]);
    }
    const double expected = (dot(loops(ahead), d_output) - dot(loops(behind), d_output)) / (2 * step);
    good = good && std::abs(expected - along) < 2e-3 * size;
    if (!good) std::printf("%s: argument %zu: expected %g along the direction, got %g\n", name, k, expected, along);
  }
  if (!good) ++failures, std::printf("%s differs: output by %g\n", name, worst);
}

int64_t at(bool channels_last, int64_t b, int64_t c, int64_t l, int64_t C, int64_t L) {
  return channels_last ? (b * L + l) * C + c : (b * C + c) * L + l;
}

void dynamic_relu(int64_t B, int64_t C, int64_t L, bool channels_last) {
  const Floats x = random_values(B * C * L), theta = random_values(B * 2 * C, 2), d_y = random_values(B * C * L);
  Floats y(x.size()), d_x(x.size()), d_theta(theta.size());
  mf::launch_dynamic_relu(y.data(), x.data(), theta.data(), B, C, L, channels_last, nullptr);
  mf::launch_dynamic_relu_backward(d_x.data(), d_theta.data(), d_y.data(), x.data(), theta.data(), B, C, L,
                                   channels_last, Memory(), nullptr);
  const auto loops = [&](const Arguments& in) {
    Doubles out(x.size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < L; ++l) {
          const int64_t i = at(channels_last, b, c, l, C, L);
          out[i] = std::max(mf::dynamic_relu_slope1(in[1][b * 2 * C + c]) * in[0][i],
                            mf::dynamic_relu_slope2(in[1][b * 2 * C + C + c]) * in[0][i]);
        }
    return out;
  };
  compare("dynamic_relu", loops, {x, theta}, y, d_y, {d_x, d_theta});
}

void mobile_to_former(int64_t B, int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  const Floats x = random_values(B * C * L), q = random_values(B * M * C), d_out = random_values(B * M * C);
  Floats out(q.size()), log_sum_exp(B * N * M), d_x(x.size()), d_q(q.size());
  mf::launch_mobile_to_former(out.data(), log_sum_exp.data(), x.data(), q.data(), shape, Memory(), nullptr);
  mf::launch_mobile_to_former_backward(d_x.data(), d_q.data(), d_out.data(), x.data(), q.data(), out.data(),
                                       log_sum_exp.data(), shape, Memory(), nullptr);
  const int64_t E = C / N;
  const auto loops = [&](const Arguments& in) {
    Doubles gathered(q.size(), 0.0);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c0 = 0; c0 < C; c0 += E)
        for (int64_t m = 0; m < M; ++m) {
          double total = 0, *row = &gathered[(b * M + m) * C];
          for (int64_t l = 0; l < L; ++l) {
            double score = 0;
            for (int64_t c = c0; c < c0 + E; ++c)
              score += in[0][at(channels_last, b, c, l, C, L)] * in[1][(b * M + m) * C + c];
            const double weight = std::exp(score / std::sqrt(double(E)));
            total += weight;
            for (int64_t c = c0; c < c0 + E; ++c) row[c] += weight * in[0][at(channels_last, b, c, l, C, L)];
          }
          for (int64_t c = c0; c < c0 + E; ++c) row[c] /= total;
        }
    return gathered;
  };
  compare("mobile_to_former", loops, {x, q}, out, d_out, {d_x, d_q});
}

#ifndef MF_PLANTED
void former_to_mobile(int64_t B, int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  const Floats x = random_values(B * C * L), k = random_values(B * M * C), v = random_values(B * M * C);
  const Floats d_y = random_values(B * C * L);
  Floats y(x.size()), d_x(x.size()), d_k(k.size()), d_v(v.size());
  mf::launch_former_to_mobile(y.data(), x.data(), k.data(), v.data(), shape, nullptr);
  mf::launch_former_to_mobile_backward(d_x.data(), d_k.data(), d_v.data(), d_y.data(), x.data(), k.data(), v.data(),
                                       shape, Memory(), nullptr);
  const int64_t E = C / N;
  const auto loops = [&](const Arguments& in) {
    Doubles out = in[0], weight(M);
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c0 = 0; c0 < C; c0 += E)
        for (int64_t l = 0; l < L; ++l) {
          double total = 0;
          for (int64_t m = 0; m < M; ++m) {
            double score = 0;
            for (int64_t c = c0; c < c0 + E; ++c)
              score += in[0][at(channels_last, b, c, l, C, L)] * in[1][(b * M + m) * C + c];
            total += weight[m] = std::exp(score / std::sqrt(double(E)));
          }
          for (int64_t m = 0; m < M; ++m)
            for (int64_t c = c0; c < c0 + E; ++c)
              out[at(channels_last, b, c, l, C, L)] += weight[m] / total * in[2][(b * M + m) * C + c];
        }
    return out;
  };
  compare("former_to_mobile", loops, {x, k, v}, y, d_y, {d_x, d_k, d_v});
}

void spatial_dynamic_relu(int64_t B, int64_t C, int64_t L, int64_t M, bool channels_last) {
  const Floats x = random_values(B * C * L), theta = random_values(B * M * 2 * C, 2), alpha = random_values(B * M * L);
  const Floats d_y = random_values(x.size());
  Floats y(x.size()), d_x(x.size()), d_theta(theta.size()), d_alpha(alpha.size());
  mf::launch_spatial_dynamic_relu(y.data(), x.data(), theta.data(), alpha.data(), B, C, L, M, channels_last, nullptr);
  mf::launch_spatial_dynamic_relu_backward(d_x.data(), d_theta.data(), d_alpha.data(), d_y.data(), x.data(),
                                           theta.data(), alpha.data(), B, C, L, M, channels_last, Memory(), nullptr);
  const auto loops = [&](const Arguments& in) {
    Doubles out(x.size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t c = 0; c < C; ++c)
        for (int64_t l = 0; l < L; ++l) {
          const int64_t i = at(channels_last, b, c, l, C, L);
          double slope1 = 0, slope2 = 0;
          for (int64_t m = 0; m < M; ++m) {
            const double weight = in[2][(b * M + m) * L + l], *row = &in[1][(b * M + m) * 2 * C];
            slope1 += weight * mf::dynamic_relu_slope1(row[c]), slope2 += weight * mf::dynamic_relu_slope2(row[C + c]);
          }
          out[i] = std::max(slope1 * in[0][i], slope2 * in[0][i]);
        }
    return out;
  };
  compare("spatial_dynamic_relu", loops, {x, theta, alpha}, y, d_y, {d_x, d_theta, d_alpha});
}

void depthwise_conv2d(int64_t B, int64_t C, int64_t H, int64_t W, int64_t mult, int64_t K, int64_t S,
                      mf::Activation activation, bool channels_last) {
  const auto s = mf::depthwise_shape(B, C, H, W, C * mult, K, S, channels_last);
  const Floats x = random_values(B * C * H * W), weight = random_values(s.O * K * K, 0.5f), bias = random_values(s.O);
  Floats y(B * s.O * s.OH * s.OW), d_x(x.size()), d_weight(weight.size()), d_bias(bias.size()), scratch(y.size());
  const Floats d_y = random_values(y.size());
  mf::launch_depthwise_conv2d(y.data(), x.data(), weight.data(), bias.data(), s, activation, nullptr);
  mf::launch_depthwise_conv2d_backward(d_x.data(), d_weight.data(), d_bias.data(), d_y.data(), x.data(), weight.data(),
                                       bias.data(), scratch.data(), s, activation, Memory(), nullptr);
  const auto loops = [&](const Arguments& in) {
    Doubles out(y.size());
    for (int64_t b = 0; b < B; ++b)
      for (int64_t o = 0; o < s.O; ++o)
        for (int64_t i = 0; i < s.OH; ++i)
          for (int64_t j = 0; j < s.OW; ++j) {
            double z = in[2][o];
            for (int64_t u = 0; u < K; ++u)
              for (int64_t v = 0; v < K; ++v) {
                const int64_t h = i * S + u - K / 2, w = j * S + v - K / 2;
                if (h < 0 || h >= H || w < 0 || w >= W) continue;
                z += in[1][(o * K + u) * K + v] * in[0][at(channels_last, b, o / mult, h * W + w, C, H * W)];
              }
            out[at(channels_last, b, o, i * s.OW + j, s.O, s.OH * s.OW)] = mf::activate(z, activation);
          }
    return out;
  };
  compare("depthwise_conv2d", loops, {x, weight, bias}, y, d_y, {d_x, d_weight, d_bias});
}
#endif

}  // namespace

int main() {
  dynamic_relu(2, 12, 35, true);
  mobile_to_former(1, 24, 40, 3, 2, true);
#ifndef MF_PLANTED
  dynamic_relu(1, 6, 36, true);
  dynamic_relu(1, 300, 3, true);
  dynamic_relu(2, 3, 15, false);
  dynamic_relu(1, 1, 1100, false);
  mobile_to_former(1, 14, 15, 6, 2, false);
  mobile_to_former(1, 132, 5, 4, 1, false);
  former_to_mobile(1, 8, 36, 8, 1, false);
  former_to_mobile(1, 132, 5, 4, 1, false);
  former_to_mobile(1, 24, 20, 3, 2, true);
  former_to_mobile(1, 6, 5, 6, 2, true);
  spatial_dynamic_relu(1, 12, 70, 3, true);
  spatial_dynamic_relu(1, 136, 4, 6, true);
  spatial_dynamic_relu(1, 16, 36, 8, false);
  spatial_dynamic_relu(2, 3, 15, 6, true);
  using mf::Activation;
  depthwise_conv2d(1, 8, 5, 4, 1, 3, 1, Activation::hardswish, true);
  depthwise_conv2d(1, 8, 6, 5, 1, 3, 2, Activation::identity, true);
  depthwise_conv2d(1, 3, 5, 4, 4, 3, 2, Activation::relu6, true);
  depthwise_conv2d(1, 3, 4, 5, 1, 5, 1, Activation::identity, true);
  depthwise_conv2d(1, 2, 5, 8, 1, 3, 1, Activation::hardswish, false);
  depthwise_conv2d(1, 2, 5, 16, 1, 3, 2, Activation::identity, false);
  depthwise_conv2d(1, 2, 5, 8, 2, 3, 1, Activation::identity, false);
  depthwise_conv2d(2, 2, 7, 5, 1, 5, 2, Activation::relu6, false);
#endif
  std::printf("%d comparisons failed\n", failures);
  return failures != 0;
}
