// Dynamic ReLU on CPU: y = max(a1 x, a2 x), slopes per sample and channel.
// Source: mf_kernels/reference.py, dynamic_relu.
//
// Legend: B batch, C channels, L = H*W positions, T stored type, A accumulator.
#define MF_EACH_SET_FILE "cpu/dynamic_relu.cpp"
#include "cpu/slopes.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"

namespace mf::MF_ISA {

template <class T>
MF_INLINE void dynamic_relu_vector(T* y, const T* x, Vector<Accumulator<T>> slope1, Vector<Accumulator<T>> slope2,
                                   int lanes) {
  using A = Accumulator<T>;
  const Vector<A> value = load(x, lanes);
  store(y, maximum_or_nan(slope1 * value, slope2 * value), lanes);
}

// `count` values of one channel of one sample, neighbours in memory
template <class T>
void dynamic_relu_plane(T* y, const T* x, Accumulator<T> slope1, Accumulator<T> slope2, int64_t count) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  const Vector<A> a1 = broadcast(slope1), a2 = broadcast(slope2);
  int64_t i = 0;
  for (; i + lanes <= count; i += lanes) dynamic_relu_vector<T>(y + i, x + i, a1, a2, lanes);
  if (i < count) dynamic_relu_vector<T>(y + i, x + i, a1, a2, int(count - i));
}

// `count` positions of one sample, C channels each, neighbours in memory
template <class T>
void dynamic_relu_rows(T* y, const T* x, const Accumulator<T>* slope1, const Accumulator<T>* slope2, int64_t count,
                       int64_t C) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int64_t l = 0; l < count; ++l, y += C, x += C) {
    int64_t c = 0;
    for (; c + lanes <= C; c += lanes) dynamic_relu_vector<T>(y + c, x + c, load(slope1 + c), load(slope2 + c), lanes);
    if (c < C) {
      dynamic_relu_vector<T>(y + c, x + c, load(slope1 + c, int(C - c)), load(slope2 + c, int(C - c)), int(C - c));
    }
  }
}

// d_x of one vector; adds its share of the slopes' gradients
template <class T>
MF_INLINE void dynamic_relu_vector_backward(T* d_x, const T* d_y, const T* x, Vector<Accumulator<T>> slope1,
                                            Vector<Accumulator<T>> slope2, Vector<Accumulator<T>>& d_slope1,
                                            Vector<Accumulator<T>>& d_slope2, int lanes) {
  using A = Accumulator<T>;
  const Vector<A> value = load(x, lanes), gradient = load(d_y, lanes);
  const Vector<A> line1 = slope1 * value, line2 = slope2 * value;
  // 1 where the first line wins, 0 where the second, 1/2 each on a tie
  const Vector<A> share1 = line1 > line2 ? broadcast(A(1)) : line1 < line2 ? Vector<A>{} : broadcast(A(0.5));
  const Vector<A> gradient1 = gradient * share1, gradient2 = gradient - gradient1;
  store(d_x, gradient1 * slope1 + gradient2 * slope2, lanes);
  d_slope1 += gradient1 * value;
  d_slope2 += gradient2 * value;
}

// Values summed in one accumulator before it goes to a second one: the error of a sum grows with the longer of the two
constexpr int64_t PARTIAL_SUM = 64;

template <class T>
void dynamic_relu_plane_backward(T* d_x, Accumulator<T>* d_slopes,  // d_slopes[0], d_slopes[1]
                                 const T* d_y, const T* x, Accumulator<T> slope1, Accumulator<T> slope2,
                                 int64_t count) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  const Vector<A> a1 = broadcast(slope1), a2 = broadcast(slope2);
  Vector<A> d_a1{}, d_a2{};
  for (int64_t begin = 0; begin < count; begin += PARTIAL_SUM * lanes) {
    const int64_t end = count - begin < PARTIAL_SUM * lanes ? count : begin + PARTIAL_SUM * lanes;
    Vector<A> part1{}, part2{};
    int64_t i = begin;
    for (; i + lanes <= end; i += lanes) {
      dynamic_relu_vector_backward<T>(d_x + i, d_y + i, x + i, a1, a2, part1, part2, lanes);
    }
    if (i < end) dynamic_relu_vector_backward<T>(d_x + i, d_y + i, x + i, a1, a2, part1, part2, int(end - i));
    d_a1 += part1;
    d_a2 += part2;
  }
  d_slopes[0] = sum_lanes(d_a1);
  d_slopes[1] = sum_lanes(d_a2);
}

// All `count` positions of `channels` channels, at most 4 vectors of them: their sums stay in registers
template <class T>
void dynamic_relu_columns_backward(T* d_x, Accumulator<T>* d_slope1, Accumulator<T>* d_slope2,  // [channels]
                                   const T* d_y, const T* x, const Accumulator<T>* slope1, const Accumulator<T>* slope2,
                                   int64_t count, int64_t channels, int64_t C) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (channels == 4 * lanes) {
    Vector<A> a1[4], a2[4], d_a1[4] = {}, d_a2[4] = {};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) a1[v] = load(slope1 + v * lanes), a2[v] = load(slope2 + v * lanes);
    for (int64_t begin = 0; begin < count; begin += PARTIAL_SUM) {
      const int64_t end = count - begin < PARTIAL_SUM ? count : begin + PARTIAL_SUM;
      Vector<A> part1[4] = {}, part2[4] = {};
      for (int64_t l = begin; l < end; ++l) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const int64_t at = l * C + v * lanes;
          dynamic_relu_vector_backward<T>(d_x + at, d_y + at, x + at, a1[v], a2[v], part1[v], part2[v], lanes);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) d_a1[v] += part1[v], d_a2[v] += part2[v];
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) store(d_slope1 + v * lanes, d_a1[v]), store(d_slope2 + v * lanes, d_a2[v]);
    return;
  }
  for (int64_t c = 0; c < channels; c += lanes) {
    const int here = int(channels - c < lanes ? channels - c : lanes);
    const Vector<A> a1 = load(slope1 + c, here), a2 = load(slope2 + c, here);
    Vector<A> d_a1{}, d_a2{};
    for (int64_t begin = 0; begin < count; begin += PARTIAL_SUM) {
      const int64_t end = count - begin < PARTIAL_SUM ? count : begin + PARTIAL_SUM;
      Vector<A> part1{}, part2{};
      for (int64_t l = begin; l < end; ++l) {
        const int64_t at = l * C + c;
        dynamic_relu_vector_backward<T>(d_x + at, d_y + at, x + at, a1, a2, part1, part2, here);
      }
      d_a1 += part1;
      d_a2 += part2;
    }
    store(d_slope1 + c, d_a1, here);
    store(d_slope2 + c, d_a2, here);
  }
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter forward_calls("dynamic_relu_fwd"), backward_calls("dynamic_relu_bwd");

constexpr int64_t GRAIN = 16384;  // values that are worth a thread

void dynamic_relu_into(const FeatureMap& y, const FeatureMap& x, const Tensor& theta) {  // theta (B, 2C)
  const int64_t B = x.batch, C = x.channels, L = x.positions();
  count_served(forward_calls);
  with_dtype(x.tensor.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    Scratch<A> slopes(2 * B * C);
    take_slopes<T>(slopes, data<T>(theta), B, C);
    const A *slope1 = slopes, *slope2 = slope1 + B * C;
    const T* x_data = data<T>(x.tensor);
    T* y_data = mutable_data<T>(y.tensor);
    if (x.channels_last) {
      torch::stable::parallel_for(0, B * L, ceil_div(GRAIN, C), [&](int64_t begin, int64_t end) {
        while (begin < end) {
          const int64_t b = begin / L, count = std::min(end, (b + 1) * L) - begin;
          MF_CALL(
              dynamic_relu_rows<T>(y_data + begin * C, x_data + begin * C, slope1 + b * C, slope2 + b * C, count, C));
          begin += count;
        }
      });
    } else {
      torch::stable::parallel_for(0, B * C, ceil_div(GRAIN, L), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          MF_CALL(dynamic_relu_plane<T>(y_data + plane * L, x_data + plane * L, slope1[plane], slope2[plane], L));
        }
      });
    }
  });
}

Arguments check(const char* op, const Tensor& x, const Tensor& theta) {
  const Arguments arguments = check_map(op, "x", x);
  arguments.tensor("theta", theta, {x.size(0), 2 * x.size(1)});
  return arguments;
}

Tensor dynamic_relu_fwd(Tensor x_in, Tensor theta) {
  check("dynamic_relu_fwd", x_in, theta);
  const FeatureMap x = feature_map(x_in), y = new_map(x, x.channels, x.height, x.width);
  dynamic_relu_into(y, x, as_contiguous(theta));
  return y.tensor;
}

// x = dynamic_relu(x)
void dynamic_relu_in_place(Tensor x_in, Tensor theta) {
  const Arguments arguments = check("dynamic_relu_", x_in, theta);
  arguments.written("x", x_in);
  arguments.apart("x", x_in, "theta", theta);
  const FeatureMap x = feature_map(x_in);
  dynamic_relu_into(x, x, as_contiguous(theta));
}

std::tuple<Tensor, Tensor> dynamic_relu_bwd(Tensor d_y_in, Tensor x_in, Tensor theta_in) {
  const Arguments arguments = check("dynamic_relu_bwd", x_in, theta_in);
  arguments.tensor("d_y", d_y_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor theta = as_contiguous(theta_in);  // (B, 2C)
  const FeatureMap d_x = new_map(x, x.channels, x.height, x.width);
  const int64_t B = x.batch, C = x.channels, L = x.positions();
  const Tensor d_theta = new_tensor({B, 2 * C}, theta.scalar_type());
  count_served(backward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    Scratch<A> slopes(2 * B * C), d_slopes(2 * B * C);
    const T *theta_data = data<T>(theta), *x_data = data<T>(x.tensor), *d_y_data = data<T>(d_y.tensor);
    T *d_x_data = mutable_data<T>(d_x.tensor), *d_theta_data = mutable_data<T>(d_theta);
    take_slopes<T>(slopes, theta_data, B, C);
    const A *slope1 = slopes, *slope2 = slope1 + B * C;
    A *d_slope1 = d_slopes, *d_slope2 = d_slope1 + B * C;
    if (x.channels_last) {
      constexpr int64_t columns = 64 / sizeof(A) * 4;  // four of the widest vectors
      const int64_t groups = ceil_div(C, columns);
      torch::stable::parallel_for(0, B * groups, ceil_div(GRAIN, L * columns), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const int64_t b = i / groups, c = i % groups * columns, at = b * C + c, offset = x.offset(b, c, 0);
          MF_CALL(dynamic_relu_columns_backward<T>(d_x_data + offset, d_slope1 + at, d_slope2 + at, d_y_data + offset,
                                                   x_data + offset, slope1 + at, slope2 + at, L,
                                                   std::min(columns, C - c), C));
        }
      });
    } else {
      torch::stable::parallel_for(0, B * C, ceil_div(GRAIN, L), [&](int64_t begin, int64_t end) {
        for (int64_t plane = begin; plane < end; ++plane) {
          A sums[2];
          MF_CALL(dynamic_relu_plane_backward<T>(d_x_data + plane * L, sums, d_y_data + plane * L, x_data + plane * L,
                                                 slope1[plane], slope2[plane], L));
          d_slope1[plane] = sums[0];
          d_slope2[plane] = sums[1];
        }
      });
    }
    for (int64_t b = 0; b < B; ++b) {  // a1 and a2 are both 2 hsig(theta) + const
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at1 = b * 2 * C + c, at2 = at1 + C;
        from_accumulator(d_theta_data[at1], slope_gradient<A>(d_slope1[b * C + c], to_accumulator(theta_data[at1])));
        from_accumulator(d_theta_data[at2], slope_gradient<A>(d_slope2[b * C + c], to_accumulator(theta_data[at2])));
      }
    }
  });
  return {d_x.tensor, d_theta};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("dynamic_relu_fwd.native", TORCH_BOX(&mf::dynamic_relu_fwd));
  m.impl("dynamic_relu_.native", TORCH_BOX(&mf::dynamic_relu_in_place));
  m.impl("dynamic_relu_bwd.native", TORCH_BOX(&mf::dynamic_relu_bwd));
}

#endif
