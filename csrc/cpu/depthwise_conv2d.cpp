// Depthwise convolution with its activation on CPU. Source: mf_kernels/reference.py, depthwise_conv2d.
//
// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride,
// T stored type, A accumulator. A task walks down some rows of one block of LANES output channels of one sample, with
// the input rows it needs in a scratch that holds a vector of channels at every column.
#define MF_OPERATOR_FILE "cpu/depthwise_conv2d.cpp"
#include "cpu/depthwise_shape.h"
#include "cpu/foreach_isa.h"

#ifdef MF_ISA

#include "cpu/simd.h"
#include "cpu/depthwise_rows.h"
#include "cpu/depthwise_products.h"

namespace mf::MF_ISA {

template <class A>
MF_INLINE Vector<A> activate(Vector<A> z, Activation activation) {
  if (activation == Activation::identity) return z;
  const Vector<A> zero{}, six = broadcast(A(6));
  if (activation == Activation::relu6) return maximum<A>(zero, z > six ? six : z);  // NaN stays
  const Vector<A> shifted = z + A(3);
  return z * maximum<A>(zero, shifted > six ? six : shifted) * A(1.0 / 6);
}

// Slope of the activation, as torch: 0 at both corners of relu6, and of hardswish outside (-3, 3)
template <class A>
MF_INLINE Vector<A> activation_slope(Vector<A> z, Activation activation) {
  const Vector<A> zero{}, one = broadcast(A(1)), three = broadcast(A(3));
  if (activation == Activation::relu6) return (z > zero) & (z < broadcast(A(6))) ? one : zero;
  if (activation == Activation::hardswish) return z < -three ? zero : z <= three ? z * A(1.0 / 3) + A(0.5) : one;
  return one;
}

// weight[t][lane], zeros in the lanes that do not exist
template <class T>
void load_weight(Vector<Accumulator<T>>* weight,  // [K*K]
                 const T* source,                 // (O, 1, K, K)
                 const ChannelBlock<Accumulator<T>>& block, int taps) {
  for (int t = 0; t < taps; ++t) {
    weight[t] = Vector<Accumulator<T>>{};
    for (int i = 0; i < block.used; ++i) weight[t][i] = to_accumulator(source[(block.o + i) * taps + t]);
  }
}

// Input rows kept under their number modulo `count`; rows outside the map are zeros
template <class T>
struct RowRing {
  using A = Accumulator<T>;
  const DepthwiseShape& shape;
  const T* x;  // one sample
  const ChannelBlock<A>& block;
  bool channels_last;
  int64_t count, next;  // rows held, first row not loaded yet
  int64_t row_size;
  Scratch<A> memory;    // count rows and one of zeros, each [W + 2*(K/2)][LANES]

  RowRing(const DepthwiseShape& s, const T* sample, const ChannelBlock<A>& b, bool last, int64_t rows, int64_t first)
      : shape(s), x(sample), block(b), channels_last(last), count(rows), next(first > 0 ? first : 0),
        row_size((s.W + 2 * s.pad()) * LANES<A>), memory((rows + 1) * row_size) {
    for (int64_t i = 0; i < (count + 1) * row_size; ++i) memory[i] = 0;
  }
  void load_until(int64_t end) {  // rows below `end`
    for (; next < end && next < shape.H; ++next) {
      load_row<T>(memory + next % count * row_size + shape.pad() * LANES<A>, x, next, shape.W, shape.C, shape.H, block, channels_last);
    }
  }
  const A* row(int64_t h) const { return memory + (h < 0 || h >= shape.H ? count : h % count) * row_size; }
};

// Output rows [begin, end) of one block of one sample
template <class T, int K, int S>
void depthwise_conv2d_rows(T* y, const T* x, const T* weight_in, const T* bias_in, const DepthwiseShape& shape, int64_t o,
                           int64_t begin, int64_t end, Activation activation, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>, pad = K / 2;
  constexpr int rows_at_once = K == 3 && S == 1 ? 2 : 1;
  const ChannelBlock<A> block(o, shape.O, shape.mult);
  Vector<A> weight[K * K], bias{};
  load_weight<T>(weight, weight_in, block, K * K);
  if (bias_in != nullptr) bias = load(bias_in + o, block.used);
  RowRing<T> ring(shape, x, block, channels_last, K + S * (rows_at_once - 1), begin * S - pad);
  Scratch<A> out(channels_last ? 0 : rows_at_once * shape.OW * lanes);

  const auto emit_rows = [&]<int ROWS>(int64_t h) {
    constexpr int reads = K + S * (ROWS - 1);
    ring.load_until(h * S - pad + reads);
    const A* rows[reads];
    for (int i = 0; i < reads; ++i) rows[i] = ring.row(h * S - pad + i);
    if (channels_last) {
      T* target = y + h * shape.OW * shape.O + o;
      const auto emit = [&](int r, int64_t w, Vector<A> z) {
        store(target + (r * shape.OW + w) * shape.O, activate<A>(z, activation), block.used);
      };
      convolve_rows<A, K, S, ROWS>(rows, weight, bias, shape.OW, emit);
    } else {
      const auto emit = [&](int r, int64_t w, Vector<A> z) { store(out + (r * shape.OW + w) * lanes, activate<A>(z, activation)); };
      convolve_rows<A, K, S, ROWS>(rows, weight, bias, shape.OW, emit);
      for (int r = 0; r < ROWS; ++r) {
        store_row<T>(y, out + r * shape.OW * lanes, h + r, shape.OW, shape.O, shape.OH, o, block.used, false);
      }
    }
  };
  int64_t h = begin;
  for (; h + rows_at_once <= end; h += rows_at_once) emit_rows.template operator()<rows_at_once>(h);
  for (; h < end; ++h) emit_rows.template operator()<1>(h);
}

// How the lanes of one block fold into input channels c_first + lane: at most `mult` shuffles, each with a mask
template <class A>
struct LaneFold {
  static constexpr int lanes = LANES<A>;
  IntegerVector<A> from[lanes];
  Vector<A> keep[lanes];
  int count = 0;

  LaneFold(const ChannelBlock<A>& block, int64_t c_first) {
    int placed[lanes] = {};
    for (int i = 0; i < lanes; ++i) from[i] = IntegerVector<A>{}, keep[i] = Vector<A>{};
    for (int i = 0; i < block.used; ++i) {
      const int target = int(block.c + block.from[i] - c_first);
      const int step = placed[target]++;
      from[step][target] = i;
      keep[step][target] = 1;
      count = count > step + 1 ? count : step + 1;
    }
  }
  MF_INLINE Vector<A> operator()(Vector<A> v) const {
    Vector<A> folded{};
    for (int i = 0; i < count; ++i) folded += permute<A>(v, from[i]) * keep[i];
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
  constexpr int lanes = LANES<A>, pad = K / 2, halo = (K - 1) / S;  // halo: output rows beyond the strip that reach its input
  const int64_t strip = shape.backward_strip(lanes * sizeof(A));
  const int64_t g_rows = strip + 2 * halo, x_rows = (g_rows - 1) * S + K;
  const int64_t g_row = (shape.OW + 2 * halo) * lanes, x_row = (shape.W + 2 * pad) * lanes, d_row = shape.W * lanes;
  Scratch<A> g_memory(g_rows * g_row), x_memory(x_rows * x_row), d_memory(strip * S * d_row);
  for (int64_t i = 0; i < g_rows * g_row; ++i) g_memory[i] = 0;
  for (int64_t i = 0; i < x_rows * x_row; ++i) x_memory[i] = 0;
  const int64_t outputs = channels * shape.mult, o_first = c_first * shape.mult;

  for (int64_t begin = 0; begin < shape.OH; begin += strip) {
    const int64_t end = begin + strip < shape.OH ? begin + strip : shape.OH;
    const int64_t h_begin = begin * S, h_end = end == shape.OH ? shape.H : end * S;  // input rows whose d_x is made here
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
        const A* rows[K];
        for (int u = 0; u < K; ++u) rows[u] = x_memory + (i * S + u) * x_row;
        if (activation != Activation::identity) {
          convolve_rows<A, K, S, 1>(rows, weight, bias, shape.OW, [&](int, int64_t w, Vector<A> z) {
            store(g + w * lanes, load(g + w * lanes) * activation_slope<A>(z, activation));
          });
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
          rows[u] = reach % S == 0 && reach >= 0 && reach / S < shape.OH ? g_base + (reach / S - g_first) * g_row : nullptr;
        }
        A* target = d_memory + (h - h_begin) * d_row;
        if (shape.mult == 1) {
          input_gradient_row<A, K, S>(rows, weight, shape.W, [&](int64_t w, Vector<A> v) { store(target + w * lanes, v); });
        } else {
          input_gradient_row<A, K, S>(rows, weight, shape.W, [&](int64_t w, Vector<A> v) {
            store(target + w * lanes, load(target + w * lanes) + fold(v));
          });
        }
      }
    }
    for (int64_t h = h_begin; h < h_end; ++h) {
      store_row<T>(d_x, d_memory + (h - h_begin) * d_row, h, shape.W, shape.C, shape.H, c_first, int(channels), channels_last);
    }
  }
}

// Output channels of one task forward, and input channels of one task backward, for this instruction set
template <class T>
void depthwise_conv2d_steps(int64_t& outputs, int64_t& channels, int64_t mult) {
  int64_t a = LANES<Accumulator<T>>, b = mult;
  while (b != 0) {
    const int64_t rest = a % b;
    a = b;
    b = rest;
  }
  outputs = LANES<Accumulator<T>>;
  channels = outputs / a;  // so that channels * mult fills whole blocks
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

Activation activation_of(const std::string& name) {
  if (name == "hardswish") return Activation::hardswish;
  if (name == "relu6") return Activation::relu6;
  STD_TORCH_CHECK(name == "identity", "depthwise_conv2d: activation: expected hardswish, relu6 or identity, got ", name);
  return Activation::identity;
}

// Calls f.template operator()<K, S>()
template <class F>
void with_window(const DepthwiseShape& shape, const F& f) {
  if (shape.K == 3) return shape.S == 1 ? f.template operator()<3, 1>() : f.template operator()<3, 2>();
  return shape.S == 1 ? f.template operator()<5, 1>() : f.template operator()<5, 2>();
}

Tensor depthwise_conv2d_fwd(Tensor x_in, Tensor weight_in, std::optional<Tensor> bias_in, int64_t stride, std::string name) {
  const FeatureMap x = feature_map(x_in);
  const Tensor weight = as_contiguous(weight_in);  // (O, 1, K, K)
  const std::optional<Tensor> bias = bias_in ? std::optional(as_contiguous(*bias_in)) : std::nullopt;  // (O)
  const DepthwiseShape shape(x, weight, stride);
  const FeatureMap y = new_map(x, shape.O, shape.OH, shape.OW);
  const Activation activation = activation_of(name);
  count_served(Kernel::depthwise_conv2d_fwd);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    const T *x_data = data<T>(x.tensor), *weight_data = data<T>(weight), *bias_data = bias ? data<T>(*bias) : nullptr;
    T* y_data = mutable_data<T>(y.tensor);
    int64_t outputs, channels;
    MF_CALL(depthwise_conv2d_steps<T>(outputs, channels, shape.mult));
    constexpr int64_t strip = 32;  // output rows of one task
    const int64_t blocks = ceil_div(shape.O, outputs), strips = ceil_div(shape.OH, strip);
    torch::stable::parallel_for(0, x.batch * blocks * strips, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t s = i % strips, o = i / strips % blocks * outputs, b = i / strips / blocks;
        with_window(shape, [&]<int K, int S>() {
          MF_CALL(depthwise_conv2d_rows<T, K, S>(y_data + y.offset(b, 0, 0), x_data + x.offset(b, 0, 0), weight_data,
                                                 bias_data, shape, o, s * strip, std::min(shape.OH, (s + 1) * strip),
                                                 activation, x.channels_last));
        });
      }
    });
  });
  return y.tensor;
}

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(Tensor d_y_in, Tensor x_in, Tensor weight_in,
                                                        std::optional<Tensor> bias_in, int64_t stride, std::string name) {
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor weight = as_contiguous(weight_in);  // (O, 1, K, K)
  const std::optional<Tensor> bias = bias_in ? std::optional(as_contiguous(*bias_in)) : std::nullopt;  // (O)
  const DepthwiseShape shape(x, weight, stride);
  const FeatureMap d_x = new_map(x, shape.C, shape.H, shape.W);
  const Tensor d_weight = new_tensor({shape.O, 1, shape.K, shape.K}, weight.scalar_type());
  const Tensor d_bias = new_tensor({shape.O}, weight.scalar_type());
  const Activation activation = activation_of(name);
  count_served(Kernel::depthwise_conv2d_bwd);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const T *x_data = data<T>(x.tensor), *d_y_data = data<T>(d_y.tensor), *weight_data = data<T>(weight);
    const T* bias_data = bias ? data<T>(*bias) : nullptr;
    T *d_x_data = mutable_data<T>(d_x.tensor), *d_weight_data = mutable_data<T>(d_weight), *d_bias_data = mutable_data<T>(d_bias);
    int64_t outputs, channels;
    MF_CALL(depthwise_conv2d_steps<T>(outputs, channels, shape.mult));
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
  m.impl("depthwise_conv2d_bwd.native", TORCH_BOX(&mf::depthwise_conv2d_bwd));
}

#endif
