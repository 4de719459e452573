// Depthwise convolution with its activation on CPU. Source: mf_kernels/reference.py, depthwise_conv2d.
//
// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride,
// T stored type, A accumulator. A task walks down some rows of one block of LANES output channels of one sample, with
// the input rows it needs in a scratch that holds a vector of channels at every column.
#define MF_OPERATOR_FILE "cpu/depthwise_conv2d.cpp"
#include "cpu/depthwise_shape.h"
#include "cpu/slopes.h"
#include "cpu/foreach_isa.h"

#ifdef MF_ISA

#include "cpu/simd.h"
#include "cpu/depthwise_rows.h"
#include "cpu/depthwise_products.h"

namespace mf::MF_ISA {

// The slopes of a dynamic ReLU, one of each a lane; unused by the other activations
template <class A>
struct Slopes {
  Vector<A> first, second;
};

template <class A, Activation ACTIVATION>
MF_INLINE Vector<A> activate(Vector<A> z, const Slopes<A>& slopes) {  // bounds first and z second, so that NaN stays
  const Vector<A> zero{}, one = broadcast(A(1)), six = broadcast(A(6));
  if constexpr (ACTIVATION == Activation::relu6) return maximum<A>(zero, minimum<A>(six, z));
  if constexpr (ACTIVATION == Activation::hardswish) {
    return z * maximum<A>(zero, minimum<A>(one, z * A(1.0 / 6) + A(0.5)));
  }
  if constexpr (ACTIVATION == Activation::dynamic_relu) return maximum_or_nan<A>(slopes.first * z, slopes.second * z);
  return z;
}

// Calls f.template operator()<ACTIVATION>()
template <class F>
MF_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::relu6: return f.template operator()<Activation::relu6>();
    case Activation::hardswish: return f.template operator()<Activation::hardswish>();
    case Activation::dynamic_relu: return f.template operator()<Activation::dynamic_relu>();
    default: return f.template operator()<Activation::identity>();
  }
}

// row[i] = activation(row[i]) for `count` vectors
template <class A>
void activate_row(A* row, int64_t count, Activation activation, const Slopes<A>& slopes) {
  if (activation == Activation::identity) return;
  with_activation(activation, [&]<Activation ACTIVATION>() {
    for (int64_t i = 0; i < count * LANES<A>; i += LANES<A>) {
      store(row + i, activate<A, ACTIVATION>(load(row + i), slopes));
    }
  });
}

// Slope of the activation, corners as in torch
template <class A>
MF_INLINE Vector<A> activation_slope(Vector<A> z, Activation activation) {
  const Vector<A> zero{}, one = broadcast(A(1)), three = broadcast(A(3));
  if (activation == Activation::relu6) return (z > zero) & (z < broadcast(A(6))) ? one : zero;
  if (activation == Activation::hardswish) return z <= -three ? zero : z < three ? z * A(1.0 / 3) + A(0.5) : one;
  return one;
}

// weight[t][lane], zeros in the lanes that do not exist
template <class T>
void load_weight(Vector<Accumulator<T>>* weight,  // [taps]
                 const T* source,                 // (O, 1, K, K)
                 const ChannelBlock<Accumulator<T>>& block, int taps) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  for (int t = 0; t < taps; t += lanes) {
    const int here = taps - t < lanes ? taps - t : lanes;
    Vector<A> square[lanes];
    for (int i = 0; i < lanes; ++i) {
      square[i] = i < block.used ? load(source + (block.o + i) * taps + t, here) : Vector<A>{};
    }
    transpose<A>(square);
    for (int i = 0; i < here; ++i) weight[t + i] = square[i];
  }
}

// Input rows kept under their number modulo `count`, a vector of channels at every column, padding included
template <class T>
struct RowRing {
  using A = Accumulator<T>;
  const DepthwiseShape& shape;
  const T* x;  // one sample
  const ChannelBlock<A>& block;
  bool channels_last;
  int64_t count, next;  // rows held, first row not loaded yet
  A* memory;            // [count][W + 2*(K/2)][LANES], zeros in the padding

  int64_t row_size() const { return (shape.W + 2 * shape.pad()) * LANES<A>; }
  void load_until(int64_t end) {  // rows below `end`
    for (; next < end && next < shape.H; ++next) {
      load_row<T>(memory + next % count * row_size() + shape.pad() * LANES<A>, x, next, shape.W, shape.C, shape.H,
                  block, channels_last);
    }
  }
  Row<A> row(int64_t h) const { return {memory + h % count * row_size(), LANES<A>}; }
};

// out[r][w] = sums of ROWS neighbouring output rows, from rows with their padding in memory
template <class A, int K, int S, int ROWS>
void convolve_into(A* out,                   // [ROWS][width][LANES]
                   const Row<A>* rows,       // [K + S*(ROWS-1)]
                   const Vector<A>* weight,  // [K*K]
                   Vector<A> bias, int64_t width) {
  const auto emit = [&](int r, int64_t w, Vector<A> z) { store(out + (r * width + w) * LANES<A>, z); };
  convolve_rows<A, K, S, ROWS, false>(rows, weight, bias, width, 0, emit);
}

// Output rows [begin, end) of a whole block of a channels_last sample of multiplier 1, read and written where it lies
template <int K, int S, Activation ACTIVATION>
void depthwise_conv2d_direct(float* y, const float* x,  // one sample
                             const Vector<float>* weight, Vector<float> bias, const DepthwiseShape& shape, int64_t o,
                             int64_t begin, int64_t end, const Slopes<float>& slopes) {
  alignas(Vector<float>) const float zeros[LANES<float>] = {};
  const int64_t C = shape.C, next_row = shape.OW * C;
  const auto make_rows = [&]<int ROWS>(int64_t h) {
    constexpr int reads = K + S * (ROWS - 1);
    Row<float> rows[reads];
    for (int i = 0; i < reads; ++i) {
      const int64_t at = h * S - K / 2 + i;
      rows[i] = at < 0 || at >= shape.H ? Row<float>{zeros, 0} : Row<float>{x + (at * shape.W - K / 2) * C + o, C};
    }
    float* target = y + h * next_row + o;
    const auto emit = [&](int r, int64_t w, Vector<float> z) {
      store(target + r * next_row + w * C, activate<float, ACTIVATION>(z, slopes));
    };
    convolve_rows<float, K, S, ROWS, true>(rows, weight, bias, shape.OW, shape.W, emit);
  };
  constexpr int rows_at_once = K == 3 && S == 1 ? 2 : 1;
  int64_t h = begin;
  for (; h + rows_at_once <= end; h += rows_at_once) make_rows.template operator()<rows_at_once>(h);
  for (; h < end; ++h) make_rows.template operator()<1>(h);
}

// The same of any block, layout, dtype and multiplier, through rows of scratch memory
template <class T, int K, int S>
void depthwise_conv2d_strip(T* y,                 // one sample
                            Accumulator<T>* out,  // [2][OW][LANES]
                            RowRing<T> ring, const Vector<Accumulator<T>>* weight, Vector<Accumulator<T>> bias,
                            int64_t begin, int64_t end, Activation activation, const Slopes<Accumulator<T>>& slopes) {
  using A = Accumulator<T>;
  const DepthwiseShape& shape = ring.shape;
  alignas(Vector<A>) const A zeros[LANES<A>] = {};
  const auto make_rows = [&]<int ROWS>(int64_t h) {
    constexpr int reads = K + S * (ROWS - 1);
    Row<A> rows[reads];
    ring.load_until(h * S - K / 2 + reads);
    for (int i = 0; i < reads; ++i) {
      const int64_t at = h * S - K / 2 + i;
      rows[i] = at < 0 || at >= shape.H ? Row<A>{zeros, 0} : ring.row(at);
    }
    convolve_into<A, K, S, ROWS>(out, rows, weight, bias, shape.OW);
    activate_row<A>(out, ROWS * shape.OW, activation, slopes);
    for (int r = 0; r < ROWS; ++r) {
      store_row<T>(y, out + r * shape.OW * LANES<A>, h + r, shape.OW, shape.O, shape.OH, ring.block.o, ring.block.used,
                   ring.channels_last);
    }
  };
  constexpr int rows_at_once = K == 3 && S == 1 ? 2 : 1;
  int64_t h = begin;
  for (; h + rows_at_once <= end; h += rows_at_once) make_rows.template operator()<rows_at_once>(h);
  for (; h < end; ++h) make_rows.template operator()<1>(h);
}

// Tasks [begin, end): task i is `STRIP` output rows of one block of one sample
template <class T, int K, int S>
void depthwise_conv2d_tasks(T* y, const T* x, const T* weight_in, const T* bias_in,
                            const Accumulator<T>* slopes_in,  // [2][B][O] of a dynamic ReLU, else null
                            const DepthwiseShape& shape, int64_t begin, int64_t end, Activation activation,
                            bool channels_last) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  constexpr int64_t held = K + S;  // input rows that two output rows read
  const int64_t blocks = (shape.O + lanes - 1) / lanes, strips = shape.forward_strips();
  const int64_t row_size = (shape.W + 2 * shape.pad()) * lanes;
  Scratch<A> out(2 * shape.OW * lanes), memory(held * row_size);
  for (int64_t i = 0; i < held * row_size; ++i) memory[i] = 0;

  for (int64_t i = begin; i < end; ++i) {
    // neighbouring tasks are neighbouring blocks of the same rows: with a multiplier they read the same channels
    const int64_t o = i % blocks * lanes, first = i / blocks % strips * DepthwiseShape::STRIP, b = i / blocks / strips;
    const int64_t last = first + DepthwiseShape::STRIP < shape.OH ? first + DepthwiseShape::STRIP : shape.OH;
    const T* sample = x + b * shape.C * shape.H * shape.W;
    T* y_sample = y + b * shape.O * shape.OH * shape.OW;
    const ChannelBlock<A> block(o, shape.O, shape.mult);
    Vector<A> weight[K * K], bias{};
    load_weight<T>(weight, weight_in, block, K * K);
    if (bias_in != nullptr) bias = load(bias_in + o, block.used);
    Slopes<A> slopes{};
    if (slopes_in != nullptr) {
      slopes = {load(slopes_in + b * shape.O + o, block.used),
                load(slopes_in + (shape.B + b) * shape.O + o, block.used)};
    }

    if constexpr (std::is_same_v<T, float>) {
      if (channels_last && shape.mult == 1 && block.used == lanes) {
        with_activation(activation, [&]<Activation ACTIVATION>() {
          depthwise_conv2d_direct<K, S, ACTIVATION>(y_sample, sample, weight, bias, shape, o, first, last, slopes);
        });
        continue;
      }
    }
    const int64_t from = first * S - K / 2;
    const RowRing<T> ring{shape, sample, block, channels_last, held, from < 0 ? 0 : from, memory};
    depthwise_conv2d_strip<T, K, S>(y_sample, out, ring, weight, bias, first, last, activation, slopes);
  }
}

// How the lanes of one block fold into input channels c_first + lane: at most `mult` shuffles, each with a mask
template <class A>
struct LaneFold {
  static constexpr int lanes = LANES<A>;
  IntegerVector<A> from[lanes], keep[lanes];  // keep: all bits set, or none
  int count = 0;

  LaneFold(const ChannelBlock<A>& block, int64_t c_first) {
    int placed[lanes] = {};
    for (int i = 0; i < lanes; ++i) from[i] = keep[i] = IntegerVector<A>{};
    for (int i = 0; i < block.used; ++i) {
      const int target = int(block.c + block.from[i] - c_first);
      const int step = placed[target]++;
      from[step][target] = i;
      keep[step][target] = -1;
      count = count > step + 1 ? count : step + 1;
    }
  }
  MF_INLINE Vector<A> operator()(Vector<A> v) const {
    Vector<A> folded{};
    for (int i = 0; i < count; ++i) {
      folded += keep[i] ? permute<A>(v, from[i]) : Vector<A>{};  // not times 0: v may be NaN
    }
    return folded;
  }
};

// All gradients of the input channels c_first ... c_first + channels - 1 of one sample. The map is walked in strips of
// output rows that keep the cache; a strip's gradients g and input rows carry a halo, so strips do not wait for another.
template <class T, int K, int S>
void depthwise_conv2d_channels_backward(T* d_x, Accumulator<T>* d_weight_out,  // [O][K*K + 1]: filters, then bias
                                        const T* d_y, const T* x, const T* weight_in, const T* bias_in,
                                        const DepthwiseShape& shape, int64_t c_first, int64_t channels,
                                        Activation activation, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>, pad = K / 2;
  constexpr int halo = (K - 1) / S;  // output rows beyond the strip that reach its input
  const int64_t strip = shape.backward_strip(lanes * sizeof(A));
  const int64_t g_rows = strip + 2 * halo, x_rows = (g_rows - 1) * S + K;
  const int64_t g_row = (shape.OW + 2 * halo) * lanes, x_row = (shape.W + 2 * pad) * lanes, d_row = shape.W * lanes;
  Scratch<A> g_memory(g_rows * g_row), x_memory(x_rows * x_row), d_memory(strip * S * d_row), z(shape.OW * lanes);
  for (int64_t i = 0; i < g_rows * g_row; ++i) g_memory[i] = 0;
  for (int64_t i = 0; i < x_rows * x_row; ++i) x_memory[i] = 0;
  const int64_t outputs = channels * shape.mult, o_first = c_first * shape.mult;

  for (int64_t begin = 0; begin < shape.OH; begin += strip) {
    const int64_t end = begin + strip < shape.OH ? begin + strip : shape.OH;
    // input rows whose d_x is made here
    const int64_t h_begin = begin * S, h_end = end == shape.OH ? shape.H : end * S;
    const int64_t g_first = begin - halo, x_first = g_first * S - pad;
    A* const g_base = g_memory + halo * lanes;  // column 0 of row g_first
    for (int64_t i = 0; i < (h_end - h_begin) * d_row; ++i) d_memory[i] = 0;

    for (int64_t o = o_first; o < o_first + outputs; o += lanes) {
      const ChannelBlock<A> block(o, o_first + outputs, shape.mult);
      Vector<A> weight[K * K], bias{};
      load_weight<T>(weight, weight_in, block, K * K);
      if (bias_in != nullptr) bias = load(bias_in + o, block.used);
      for (int64_t i = 0; i < x_rows; ++i) {
        A* row = x_memory + i * x_row;
        if (x_first + i >= 0 && x_first + i < shape.H) {
          load_row<T>(row + pad * lanes, x, x_first + i, shape.W, shape.C, shape.H, block, channels_last);
        } else {
          for (int64_t j = 0; j < x_row; ++j) row[j] = 0;
        }
      }
      const ChannelBlock<A> gradient_block(o, o_first + outputs, 1);
      for (int64_t i = 0; i < g_rows; ++i) {
        const int64_t h = g_first + i;
        A* g = g_base + i * g_row;
        if (h < 0 || h >= shape.OH) {
          for (int64_t j = 0; j < shape.OW * lanes; ++j) g[j] = 0;
          continue;
        }
        load_row<T>(g, d_y, h, shape.OW, shape.O, shape.OH, gradient_block, channels_last);
        Row<A> rows[K];
        for (int u = 0; u < K; ++u) rows[u] = {x_memory + (i * S + u) * x_row, lanes};
        if (activation != Activation::identity) {
          convolve_into<A, K, S, 1>(z, rows, weight, bias, shape.OW);
          for (int64_t j = 0; j < shape.OW * lanes; j += lanes) {
            store(g + j, load(g + j) * activation_slope<A>(load(z + j), activation));
          }
        }
        if (h >= begin && h < end) {
          A* sums = d_weight_out + o * (K * K + 1);
          Vector<A> d_weight[K * K] = {}, d_bias{};
          add_weight_gradient<A, K, S>(d_weight, d_bias, g, rows, shape.OW);
          for (int lane = 0; lane < block.used; ++lane) {
            for (int t = 0; t < K * K; ++t) sums[lane * (K * K + 1) + t] += d_weight[t][lane];
            sums[lane * (K * K + 1) + K * K] += d_bias[lane];
          }
        }
      }
      const LaneFold<A> fold(block, c_first);
      for (int64_t h = h_begin; h < h_end; ++h) {
        const A* rows[K];
        for (int u = 0; u < K; ++u) {
          const int64_t reach = h + pad - u;  // S times the output row that tap u connects to row h
          rows[u] =
              reach % S == 0 && reach >= 0 && reach / S < shape.OH ? g_base + (reach / S - g_first) * g_row : nullptr;
        }
        A* target = d_memory + (h - h_begin) * d_row;
        if (shape.mult == 1) {
          input_gradient_row<A, K, S>(rows, weight, shape.W,
                                      [&](int64_t w, Vector<A> v) { store(target + w * lanes, v); });
        } else {
          input_gradient_row<A, K, S>(rows, weight, shape.W, [&](int64_t w, Vector<A> v) {
            store(target + w * lanes, load(target + w * lanes) + fold(v));
          });
        }
      }
    }
    for (int64_t h = h_begin; h < h_end; ++h) {
      store_row<T>(d_x, d_memory + (h - h_begin) * d_row, h, shape.W, shape.C, shape.H, c_first, int(channels),
                   channels_last);
    }
  }
}

// Tasks of one sample forward, and input channels of one task backward, for this instruction set
template <class T>
void depthwise_conv2d_steps(int64_t& tasks, int64_t& channels, const DepthwiseShape& shape) {
  constexpr int64_t lanes = LANES<Accumulator<T>>;
  tasks = (shape.O + lanes - 1) / lanes * shape.forward_strips();
  int64_t common = lanes, b = shape.mult;  // greatest common divisor
  while (b != 0) {
    const int64_t rest = common % b;
    common = b;
    b = rest;
  }
  channels = lanes / common;  // so that channels * mult fills whole blocks
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "hardswish") return Activation::hardswish;
  if (name == "relu6") return Activation::relu6;
  STD_TORCH_CHECK(name == "identity", "depthwise_conv2d: activation: expected hardswish, relu6 or identity, got ",
                  name);
  return Activation::identity;
}

// Calls f.template operator()<K, S>()
template <class F>
void with_window(const DepthwiseShape& shape, const F& f) {
  if (shape.K == 3) return shape.S == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  return shape.S == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

Tensor forward(const Tensor& x_in, const Tensor& weight_in, const std::optional<Tensor>& bias_in,
               const std::optional<Tensor>& theta_in, int64_t stride, Activation activation) {
  const FeatureMap x = feature_map(x_in);
  const Tensor weight = as_contiguous(weight_in);                     // (O, 1, K, K)
  const Tensor bias = bias_in ? as_contiguous(*bias_in) : weight;     // (O), else not read
  const Tensor theta = theta_in ? as_contiguous(*theta_in) : weight;  // (B, 2*O), else not read
  const DepthwiseShape shape(x, weight, stride);
  const FeatureMap y = new_map(x, shape.O, shape.OH, shape.OW);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const T *x_data = data<T>(x.tensor), *weight_data = data<T>(weight), *bias_data = bias_in ? data<T>(bias) : nullptr;
    T* y_data = mutable_data<T>(y.tensor);
    Scratch<A> slope_memory(theta_in ? 2 * shape.B * shape.O : 0);
    const A* slopes = nullptr;
    if (theta_in) {
      take_slopes<T>(slope_memory, data<T>(theta), shape.B, shape.O);
      slopes = slope_memory;
    }
    int64_t tasks, channels;
    MF_CALL(depthwise_conv2d_steps<T>(tasks, channels, shape));
    torch::stable::parallel_for(0, shape.B * tasks, 1, [&](int64_t begin, int64_t end) {
      with_window(shape, [&]<int K, int S>() {
        MF_CALL(depthwise_conv2d_tasks<T, K, S>(y_data, x_data, weight_data, bias_data, slopes, shape, begin, end,
                                                activation, x.channels_last));
      });
    });
  });
  return y.tensor;
}

Tensor depthwise_conv2d_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                            std::string activation) {
  count_served(Kernel::depthwise_conv2d_fwd);
  return forward(x, weight, bias, std::nullopt, stride, activation_of(activation));
}

Tensor depthwise_dynamic_relu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor theta, int64_t stride) {
  count_served(Kernel::depthwise_dynamic_relu);
  return forward(x, weight, bias, theta, stride, Activation::dynamic_relu);
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(Tensor d_y_in, Tensor x_in, Tensor weight_in,
                                                        std::optional<Tensor> bias_in, int64_t stride,
                                                        std::string name) {
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor weight = as_contiguous(weight_in);                  // (O, 1, K, K)
  const Tensor bias = bias_in ? as_contiguous(*bias_in) : weight;  // (O), else not read
  const DepthwiseShape shape(x, weight, stride);
  const FeatureMap d_x = new_map(x, shape.C, shape.H, shape.W);
  const Tensor d_weight = new_tensor({shape.O, 1, shape.K, shape.K}, weight.scalar_type());
  const Tensor d_bias = new_tensor({shape.O}, weight.scalar_type());
  const Activation activation = activation_of(name);
  count_served(Kernel::depthwise_conv2d_bwd);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const T *x_data = data<T>(x.tensor), *d_y_data = data<T>(d_y.tensor), *weight_data = data<T>(weight);
    const T* bias_data = bias_in ? data<T>(bias) : nullptr;
    T *d_x_data = mutable_data<T>(d_x.tensor), *d_weight_data = mutable_data<T>(d_weight),
      *d_bias_data = mutable_data<T>(d_bias);
    int64_t tasks, channels;
    MF_CALL(depthwise_conv2d_steps<T>(tasks, channels, shape));
    const int64_t groups = ceil_div(shape.C, channels), taps = shape.K * shape.K, sums = shape.O * (taps + 1);
    Scratch<A> partials(x.batch * sums);  // of every sample, summed in order so that threads change nothing
    for (int64_t i = 0; i < x.batch * sums; ++i) partials[i] = 0;
    torch::stable::parallel_for(0, x.batch * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i % groups * channels, b = i / groups;
        with_window(shape, [&]<int K, int S>() {
          MF_CALL(depthwise_conv2d_channels_backward<T, K, S>(
              d_x_data + x.offset(b, 0, 0), partials + b * sums, d_y_data + d_y.offset(b, 0, 0),
              x_data + x.offset(b, 0, 0), weight_data, bias_data, shape, c, std::min(channels, shape.C - c), activation,
              x.channels_last));
        });
      }
    });
    for (int64_t o = 0; o < shape.O; ++o) {
      for (int64_t t = 0; t <= taps; ++t) {
        A total = 0;
        for (int64_t b = 0; b < x.batch; ++b) total += partials[b * sums + o * (taps + 1) + t];
        from_accumulator(t < taps ? d_weight_data[o * taps + t] : d_bias_data[o], total);
      }
    }
  });
  return {d_x.tensor, d_weight, d_bias};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("depthwise_conv2d_fwd.native", TORCH_BOX(&mf::depthwise_conv2d_fwd));
  m.impl("depthwise_dynamic_relu.native", TORCH_BOX(&mf::depthwise_dynamic_relu));
  m.impl("depthwise_conv2d_bwd.native", TORCH_BOX(&mf::depthwise_conv2d_bwd));
}

#endif
