// BatchNorm with the statistics of the batch and the activation behind it on CPU, forward and backward.
// Source: mf_kernels/ops/batch_norm_activation.py.
//
// Legend: B batch, C channels, L = H*W positions, N = B*L values of a channel, A stored type and accumulator.
// channels_last: tasks are parts of the map, each leaves its sums, and they are added in order. Contiguous: a task is
// one channel.
#define MF_EACH_SET_FILE "cpu/batch_norm_activation.cpp"
#include "cpu/batch_norm_shape.h"
#include "cpu/slopes.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "cpu/activation.isa.h"
#include "cpu/batch_norm.isa.h"
#include "cpu/batch_norm_columns.isa.h"
#include "cpu/batch_norm_planes.isa.h"

#else

namespace mf {
namespace {

KernelCounter forward_calls("batch_norm_activation_fwd"), backward_calls("batch_norm_activation_bwd");

constexpr int64_t GRAIN = 16384;  // values that are worth a thread

// Calls f.template operator()<ACTIVATION>()
template <class F>
void with_norm_activation(const std::string& name, const F& f) {
  if (name == "relu6") return f.template operator()<Activation::relu6>();
  if (name == "dynamic_relu") return f.template operator()<Activation::dynamic_relu>();
  if (name != "identity") {
    refuse("batch_norm_activation", "activation", "identity, relu6 or dynamic_relu, got ", name.substr(0, 40));
  }
  return f.template operator()<Activation::identity>();
}

// Calls f.template operator()<A>()
template <class F>
void with_norm_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  if (dtype == torch::headeronly::ScalarType::Double) return f.template operator()<double>();
  return f.template operator()<float>();
}

// Mean of every channel, and the mean squared distance from it
template <class A>
void batch_statistics(double* mean, double* variance, const FeatureMap& x) {  // [C]
  const int64_t B = x.batch, C = x.channels, L = x.positions(), N = B * L;
  const A* x_data = data<A>(x.tensor);
  if (!x.channels_last) {
    torch::stable::parallel_for(0, C, ceil_div(GRAIN, N), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const A* planes = x_data + c * L;
        const A pivot = planes[0];  // differences from a value lose less of their digits, where all are far from zero
        A sums[2];
        MF_CALL(batch_norm_plane_distances<A>(sums, planes, pivot, B, L, C * L));
        mean[c] = double(pivot) + double(sums[0]) / double(N);
        MF_CALL(batch_norm_plane_distances<A>(sums, planes, A(mean[c]), B, L, C * L));
        variance[c] = double(sums[1]) / double(N);
      }
    });
    return;
  }
  const NormTasks tasks(x, false, sizeof(A));
  Scratch<A> parts(tasks.count() * 2 * C);  // [task][sum, squares][C]
  torch::stable::parallel_for(0, tasks.count(), ceil_div(GRAIN, tasks.strip * C), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto [first, last, position, count] = tasks.task(i);
      A* part = parts + i * 2 * C;
      MF_CALL(batch_norm_columns_statistics<A>(part, part + C, x_data + position * C, count, C));
    }
  });
  for (int64_t c = 0; c < C; ++c) mean[c] = variance[c] = 0;
  for (int64_t i = 0; i < tasks.count(); ++i) {
    const auto [first, last, position, count] = tasks.task(i);
    const A *sum = parts + i * 2 * C, *pivot = x_data + position * C;  // sums are of differences from the first value
    for (int64_t c = 0; c < C; ++c) mean[c] += double(sum[c]) + double(count) * double(pivot[c]);
  }
  for (int64_t c = 0; c < C; ++c) mean[c] /= double(N);
  for (int64_t i = 0; i < tasks.count(); ++i) {
    const auto [first, last, position, count] = tasks.task(i);
    const A *sum = parts + i * 2 * C, *squares = sum + C, *pivot = x_data + position * C;
    const double inverse = 1 / double(count);
    for (int64_t c = 0; c < C; ++c) {
      const double apart = double(sum[c]) * inverse + double(pivot[c]) - mean[c];
      variance[c] += double(squares[c]) + double(count) * apart * apart;
    }
  }
  for (int64_t c = 0; c < C; ++c) variance[c] /= double(N);
}

// running += momentum (batch - running), the variance without bias
template <class A>
void update_running(A* running_mean, A* running_variance, const double* mean, const double* variance, int64_t C,
                    double count, double momentum) {
  for (int64_t c = 0; c < C; ++c) {
    running_mean[c] += A(momentum * (mean[c] - double(running_mean[c])));
    running_variance[c] += A(momentum * (variance[c] * (count / (count - 1)) - double(running_variance[c])));
  }
}

// The norm and the slopes of every channel, in memory of their own
template <class A>
struct NormMemory {
  Scratch<A> scale, shift, slopes;
  ChannelNorm<A> norm;
  NormMemory(const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& inverse_deviation,
             const std::optional<Tensor>& theta, int64_t B, int64_t C)
      : scale(C), shift(C), slopes(theta ? 2 * B * C : 0) {
    const A *gamma = data<A>(weight), *beta = data<A>(bias), *mu = data<A>(mean), *inverse = data<A>(inverse_deviation);
    for (int64_t c = 0; c < C; ++c) {
      scale[c] = gamma[c] * inverse[c];
      shift[c] = beta[c] - mu[c] * scale[c];
    }
    if (theta) take_slopes<A>(slopes, data<A>(*theta), B, C);
    norm = {mu, scale, shift, slopes, slopes + B * C};
  }
};

Arguments check(const char* op, const Tensor& x, const Tensor& weight, const Tensor& bias,
                const std::optional<Tensor>& theta, const std::string& activation) {
  const Arguments arguments(op, "x", x, cpu(), {ScalarType::Float, ScalarType::Double});
  arguments.feature_map("x", x);
  if (x.size(0) * x.size(2) * x.size(3) < 2) {
    refuse(op, "x", "more than one value a channel, got ", shape_text(x.sizes()));
  }
  arguments.tensor("weight", weight, {x.size(1)});
  arguments.tensor("bias", bias, {x.size(1)});
  with_norm_activation(activation, []<Activation>() {});
  if (theta.has_value() != (activation == "dynamic_relu")) {
    refuse(op, "theta", "a tensor with dynamic_relu, and only then, got ", theta ? "one" : "none");
  }
  if (theta) arguments.tensor("theta", *theta, {x.size(0), 2 * x.size(1)});
  return arguments;
}

std::optional<Tensor> contiguous_theta(const std::optional<Tensor>& theta) {
  return theta ? std::optional<Tensor>(as_contiguous(*theta)) : std::nullopt;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_activation_fwd(Tensor x_in, Tensor weight_in, Tensor bias_in,
                                                             std::optional<Tensor> theta_in, Tensor running_mean,
                                                             Tensor running_variance, double momentum, double eps,
                                                             std::string activation) {
  const Arguments arguments = check("batch_norm_activation_fwd", x_in, weight_in, bias_in, theta_in, activation);
  const std::pair<const char*, const Tensor&> running[] = {{"running_mean", running_mean},
                                                           {"running_variance", running_variance}};
  for (const auto& [name, statistics] : running) {
    arguments.tensor(name, statistics, {x_in.size(1)});
    arguments.written(name, statistics);
    arguments.apart(name, statistics, "x", x_in);
    arguments.apart(name, statistics, "weight", weight_in);
    arguments.apart(name, statistics, "bias", bias_in);
    if (theta_in) arguments.apart(name, statistics, "theta", *theta_in);
  }
  arguments.apart("running_mean", running_mean, "running_variance", running_variance);
  const FeatureMap x = feature_map(x_in), y = new_map(x, x.channels, x.height, x.width);
  const Tensor weight = as_contiguous(weight_in), bias = as_contiguous(bias_in);  // (C)
  const std::optional<Tensor> theta = contiguous_theta(theta_in);                 // (B, 2C)
  const int64_t B = x.batch, C = x.channels, L = x.positions();
  const Tensor mean = new_tensor({C}, x_in.scalar_type()), inverse_deviation = new_tensor({C}, x_in.scalar_type());
  count_served(forward_calls);
  with_norm_dtype(x_in.scalar_type(), [&]<class A>() {
    Scratch<double> statistics(2 * C);
    batch_statistics<A>(statistics, statistics + C, x);
    A *mean_data = mutable_data<A>(mean), *inverse = mutable_data<A>(inverse_deviation);
    for (int64_t c = 0; c < C; ++c) {
      mean_data[c] = A(statistics[c]);
      inverse[c] = A(1 / std::sqrt(statistics[C + c] + eps));
    }
    update_running<A>(mutable_data<A>(running_mean), mutable_data<A>(running_variance), statistics, statistics + C, C,
                      double(B * L), momentum);
    const NormMemory<A> memory(weight, bias, mean, inverse_deviation, theta, B, C);
    const ChannelNorm<A>& norm = memory.norm;
    const A* x_data = data<A>(x.tensor);
    A* y_data = mutable_data<A>(y.tensor);
    with_norm_activation(activation, [&]<Activation ACTIVATION>() {
      if (!x.channels_last) {
        torch::stable::parallel_for(0, C, ceil_div(GRAIN, B * L), [&](int64_t begin, int64_t end) {
          for (int64_t c = begin; c < end; ++c) {
            MF_CALL(batch_norm_plane<A, ACTIVATION>(y_data + c * L, x_data + c * L, norm, c, C, B, L));
          }
        });
        return;
      }
      const NormTasks tasks(x, theta.has_value(), sizeof(A));
      const int64_t grain = ceil_div(GRAIN, tasks.group * tasks.strip * C);
      torch::stable::parallel_for(0, tasks.count(), grain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const auto [first, last, position, count] = tasks.task(i);
          MF_CALL(batch_norm_columns<A, ACTIVATION>(y_data + position * C, x_data + position * C, norm, first, last,
                                                    count, C));
        }
      });
    });
  });
  return {y.tensor, mean, inverse_deviation};
}

// d_theta of one slope, 2 hsig(theta) + const, from the slope's gradient
template <class A>
void take_theta_gradients(A* d_theta, const A* d_slope1, const A* d_slope2, const A* theta, int64_t B, int64_t C) {
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t c = 0; c < C; ++c) {
      d_theta[b * 2 * C + c] = slope_gradient<A>(d_slope1[b * C + c], theta[b * 2 * C + c]);
      d_theta[b * 2 * C + C + c] = slope_gradient<A>(d_slope2[b * C + c], theta[b * 2 * C + C + c]);
    }
  }
}

// What the gradients of one call are made of
template <class A>
struct NormBackward {
  const FeatureMap &x, &d_out, &d_x;
  const ChannelNorm<A>& norm;
  const A* inverse;        // [C], of the deviation
  A *d_weight, *d_bias;    // [C]
  A *d_slope1, *d_slope2;  // [B][C], for a dynamic ReLU

  template <Activation ACTIVATION>
  void planes() const {
    const int64_t B = x.batch, C = x.channels, L = x.positions();
    torch::stable::parallel_for(0, C, ceil_div(GRAIN, B * L), [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const A *x_data = data<A>(x.tensor) + c * L, *d_out_data = data<A>(d_out.tensor) + c * L;
        A sums[2];
        MF_CALL(batch_norm_plane_sums<A, ACTIVATION>(sums, d_slope1 + c, d_slope2 + c, d_out_data, x_data, norm, c, C,
                                                     B, L));
        A average, projection;
        finish(average, projection, c, double(sums[0]), double(sums[1]));
        MF_CALL(batch_norm_plane_backward<A, ACTIVATION>(mutable_data<A>(d_x.tensor) + c * L, d_out_data, x_data, norm,
                                                         average, projection, c, C, B, L));
      }
    });
  }

  template <Activation ACTIVATION>
  void columns() const {
    const int64_t C = x.channels;
    const bool by_sample = ACTIVATION == Activation::dynamic_relu;
    const NormTasks tasks(x, by_sample, sizeof(A));
    const int64_t grain = ceil_div(GRAIN, tasks.group * tasks.strip * C), count = tasks.count();
    const int64_t part_samples = by_sample ? tasks.group : 0, slopes_size = part_samples * 2 * C;
    const A *x_data = data<A>(x.tensor), *d_out_data = data<A>(d_out.tensor);
    A* d_x_data = mutable_data<A>(d_x.tensor);
    Scratch<A> parts(count * 2 * C), slope_parts(count * slopes_size), averages(2 * C);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [first, last, position, L] = tasks.task(i);
        MF_CALL(batch_norm_columns_sums<A, ACTIVATION>(parts + i * 2 * C, slope_parts + i * slopes_size,
                                                       d_out_data + position * C, x_data + position * C, norm, first,
                                                       last, L, C));
      }
    });
    if constexpr (ACTIVATION == Activation::dynamic_relu) add_slopes(slope_parts, tasks);
    Scratch<double> sums(2 * C);
    for (int64_t j = 0; j < 2 * C; ++j) sums[j] = 0;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < 2 * C; ++j) sums[j] += double(parts[i * 2 * C + j]);
    }
    A *average = averages, *projection = averages + C;
    for (int64_t c = 0; c < C; ++c) finish(average[c], projection[c], c, sums[c], sums[C + c]);
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const auto [first, last, position, L] = tasks.task(i);
        MF_CALL(batch_norm_columns_backward<A, ACTIVATION>(d_x_data + position * C, d_out_data + position * C,
                                                           x_data + position * C, norm, average, projection, first,
                                                           last, L, C));
      }
    });
  }

 private:
  // The gradients of a channel's parameters, and what is taken off every d_y of it
  void finish(A& average, A& projection, int64_t c, double sum, double projected) const {
    const double N = double(x.batch * x.positions()), along = projected * double(inverse[c]);
    d_bias[c] = A(sum);
    d_weight[c] = A(along);
    average = A(sum / N);
    projection = A(along * double(inverse[c]) / N);
  }

  // The slopes' gradients of every sample: its strips, added in order
  void add_slopes(const A* parts, const NormTasks& tasks) const {  // [task][sample of the task][2][C]
    const int64_t C = x.channels;
    for (int64_t b = 0; b < x.batch; ++b) {
      const int64_t first_task = b / tasks.group * tasks.strips;
      for (int64_t c = 0; c < C; ++c) d_slope1[b * C + c] = d_slope2[b * C + c] = 0;
      for (int64_t strip = 0; strip < tasks.strips; ++strip) {
        const A* part = parts + ((first_task + strip) * tasks.group + b % tasks.group) * 2 * C;
        for (int64_t c = 0; c < C; ++c) d_slope1[b * C + c] += part[c], d_slope2[b * C + c] += part[C + c];
      }
    }
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_activation_bwd(Tensor d_out_in, Tensor x_in, Tensor weight_in,
                                                                     Tensor bias_in, std::optional<Tensor> theta_in,
                                                                     Tensor mean_in, Tensor inverse_deviation_in,
                                                                     std::string activation) {
  const Arguments arguments = check("batch_norm_activation_bwd", x_in, weight_in, bias_in, theta_in, activation);
  arguments.tensor("d_y", d_out_in, {x_in.size(0), x_in.size(1), x_in.size(2), x_in.size(3)});
  arguments.tensor("mean", mean_in, {x_in.size(1)});
  arguments.tensor("inverse_deviation", inverse_deviation_in, {x_in.size(1)});
  const FeatureMap x = feature_map(x_in), d_out = feature_map_as(d_out_in, x.channels_last);
  const FeatureMap d_x = new_map(x, x.channels, x.height, x.width);
  const Tensor weight = as_contiguous(weight_in), bias = as_contiguous(bias_in);                        // (C)
  const std::optional<Tensor> theta = contiguous_theta(theta_in);                                       // (B, 2C)
  const Tensor mean = as_contiguous(mean_in), inverse_deviation = as_contiguous(inverse_deviation_in);  // (C)
  const int64_t B = x.batch, C = x.channels;
  const Tensor d_weight = new_tensor({C}, x_in.scalar_type()), d_bias = new_tensor({C}, x_in.scalar_type());
  const Tensor d_theta = new_tensor({theta ? B : 0, 2 * C}, x_in.scalar_type());
  count_served(backward_calls);
  with_norm_dtype(x_in.scalar_type(), [&]<class A>() {
    const NormMemory<A> memory(weight, bias, mean, inverse_deviation, theta, B, C);
    Scratch<A> d_slopes(theta ? 2 * B * C : 0);
    const NormBackward<A> backward{x,
                                   d_out,
                                   d_x,
                                   memory.norm,
                                   data<A>(inverse_deviation),
                                   mutable_data<A>(d_weight),
                                   mutable_data<A>(d_bias),
                                   d_slopes,
                                   d_slopes + B * C};
    with_norm_activation(activation, [&]<Activation ACTIVATION>() {
      x.channels_last ? backward.template columns<ACTIVATION>() : backward.template planes<ACTIVATION>();
    });
    if (theta) {
      take_theta_gradients<A>(mutable_data<A>(d_theta), d_slopes, d_slopes + B * C, data<A>(*theta), B, C);
    }
  });
  return {d_x.tensor, d_weight, d_bias, d_theta};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("batch_norm_activation_fwd.native", TORCH_BOX(&mf::batch_norm_activation_fwd));
  m.impl("batch_norm_activation_bwd.native", TORCH_BOX(&mf::batch_norm_activation_bwd));
}

#endif
