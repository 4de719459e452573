// Gradients of the depthwise convolution with its activation on CPU. Source: mf_kernels/reference.py, depthwise_conv2d.
//
// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride,
// T stored type, A accumulator. A task is all gradients of some input channels of some samples. It walks down the map
// in strips of rows that keep the second-level cache.
#define MF_EACH_SET_FILE "cpu/depthwise_conv2d_backward.cpp"
#include "cpu/depthwise_shape.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "cpu/activation.isa.h"
#include "cpu/depthwise_filters.isa.h"
#include "cpu/depthwise_rows.isa.h"
#include "cpu/depthwise_products.isa.h"

namespace mf::MF_ISA {

// sums[t] += what one output row, of gradients g, gives to the filters. A row is summed by itself first: the error of a
// sum grows with its length.
template <class A, int K, int S, bool BORDERED>
MF_INLINE void add_row_to_filters(A* sums,  // [K*K + 1][LANES]
                                  const Row<A>& g, const Row<A>* rows, const DepthwiseShape& shape) {
  Vector<A> row_sums[K * K + 1] = {};
  add_weight_gradient<A, K, S, BORDERED>(row_sums, g, rows, shape.OW, shape.W);
#pragma GCC unroll 26
  for (int t = 0; t <= K * K; ++t) store(sums + t * LANES<A>, load(sums + t * LANES<A>) + row_sums[t]);
}

// A whole block of a channels_last sample, multiplier and stride 1, no activation: read and written where it lies
template <int K>
void depthwise_conv2d_direct_backward(float* d_x, float* sums, const float* d_y, const float* x,  // at the block
                                      const Filters<float, K>& filters, const DepthwiseShape& shape) {
  alignas(Vector<float>) const float zeros[LANES<float>] = {};
  constexpr int pad = K / 2;
  const int64_t C = shape.C, row = shape.W * C;
  const auto exists = [&](int64_t h) { return h >= 0 && h < shape.H; };
  for (int64_t h = 0; h < shape.H; ++h) {
    Row<float> rows[K], g_rows[K];
    for (int u = 0; u < K; ++u) {
      const int64_t above = h + u - pad, below = h + pad - u;
      rows[u] = exists(above) ? Row<float>{x + above * row - pad * C, C} : Row<float>{zeros, 0};
      g_rows[u] = {exists(below) ? d_y + below * row : nullptr, C};
    }
    add_row_to_filters<float, K, 1, true>(sums, {d_y + h * row, C}, rows, shape);
    input_gradient_row<float, K, 1, true>(g_rows, filters.tap, shape.W, shape.OW,
                                          [&](int64_t w, Vector<float> v) { store(d_x + h * row + w * C, v); });
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
    for (int i = 0; i < block.used; ++i) {
      const int target = int(block.c + block.from[i] - c_first);
      const int step = placed[target]++;
      if (step == count) from[count] = keep[count] = IntegerVector<A>{}, ++count;
      from[step][target] = i;
      keep[step][target] = -1;
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

// Everything else, through rows of scratch memory with zeros around. Strips of output rows keep the cache; a strip's
// gradients g and input rows carry a halo, so strips do not wait for another.
template <class T, int K, int S>
class BackwardStrips {
  using A = Accumulator<T>;
  static constexpr int lanes = LANES<A>, pad = K / 2;
  static constexpr int halo = (pad + S - 1) / S;  // output rows beyond the strip, or columns, that reach its input

  const DepthwiseShape& shape;
  const int64_t strip, g_rows, x_rows, g_row, x_row, d_row;
  Scratch<A> g_memory, x_memory, d_memory, z;

 public:
  explicit BackwardStrips(const DepthwiseShape& of)
      : shape(of), strip(of.backward_strip(lanes * sizeof(A))), g_rows(strip + 2 * halo), x_rows((g_rows - 1) * S + K),
        g_row((of.OW + 2 * halo) * lanes), x_row((of.W + 2 * pad) * lanes), d_row(of.W * lanes),
        g_memory(g_rows * g_row), x_memory(x_rows * x_row), d_memory(strip * S * d_row), z(of.OW * lanes) {
    for (int64_t i = 0; i < g_rows * g_row; ++i) g_memory[i] = 0;
    for (int64_t i = 0; i < x_rows * x_row; ++i) x_memory[i] = 0;
  }

  // The input channels c_first ... c_first + channels - 1 of one sample; adds to the sums of their filters
  void run(T* d_x, A* sums,  // [blocks][K*K + 1][LANES]
           const T* d_y, const T* x, const A* packed, int64_t c_first, int64_t channels, Activation activation,
           bool channels_last) {
    const int64_t o_first = c_first * shape.mult, o_end = o_first + channels * shape.mult;
    for (int64_t begin = 0; begin < shape.OH; begin += strip) {
      const int64_t end = begin + strip < shape.OH ? begin + strip : shape.OH;
      // input rows whose d_x is made here
      const int64_t h_begin = begin * S, h_end = end == shape.OH ? shape.H : end * S;
      for (int64_t i = 0; i < (h_end - h_begin) * d_row; ++i) d_memory[i] = 0;
      for (int64_t o = o_first; o < o_end; o += lanes) {
        const ChannelBlock<A> block(o, o_end, shape.mult);
        const int64_t at = (o - o_first) * (K * K + 1);
        const Filters<A, K> filters(packed + at);
        load_gradients(begin, end, sums + at, d_y, x, block, filters, activation, channels_last);
        add_input_gradients(begin, h_begin, h_end, block, c_first, filters);
      }
      for (int64_t h = h_begin; h < h_end; ++h) {
        store_row<T>(d_x, d_memory + (h - h_begin) * d_row, h, shape.W, shape.C, shape.H, c_first, int(channels),
                     channels_last);
      }
    }
  }

 private:
  A* g_column0(int64_t row) const { return g_memory + row * g_row + halo * lanes; }

  // g of the strip and its halo, and what the strip's rows give to the filters
  void load_gradients(int64_t begin, int64_t end, A* sums, const T* d_y, const T* x, const ChannelBlock<A>& block,
                      const Filters<A, K>& filters, Activation activation, bool channels_last) {
    alignas(Vector<A>) const A zeros[lanes] = {};
    const int64_t first = begin - halo, x_first = first * S - pad, last = end + halo < shape.OH ? end + halo : shape.OH;
    const int64_t x_last = (last - 1) * S - pad + K;  // past the last row read
    for (int64_t h = x_first < 0 ? 0 : x_first; h < x_last && h < shape.H; ++h) {
      load_row<T>(x_memory + (h - x_first) * x_row + pad * lanes, x, h, shape.W, shape.C, shape.H, block,
                  channels_last);
    }
    const ChannelBlock<A> own(block.o, block.o + block.used, 1);
    for (int64_t h = first < 0 ? 0 : first; h < last; ++h) {
      A* g = g_column0(h - first);
      load_row<T>(g, d_y, h, shape.OW, shape.O, shape.OH, own, channels_last);
      Row<A> rows[K];
      for (int u = 0; u < K; ++u) {
        const int64_t at = h * S - pad + u;
        rows[u] = at < 0 || at >= shape.H ? Row<A>{zeros, 0} : Row<A>{x_memory + (at - x_first) * x_row, lanes};
      }
      if (activation != Activation::identity) {
        convolve_into<A, K, S, 1>(z, rows, filters.tap, filters.bias, shape.OW);
        for (int64_t j = 0; j < shape.OW * lanes; j += lanes) {
          store(g + j, activation_gradient<A>(load(g + j), load(z + j), activation));
        }
      }
      if (h >= begin && h < end) add_row_to_filters<A, K, S, false>(sums, {g, lanes}, rows, shape);
    }
  }

  void add_input_gradients(int64_t begin, int64_t h_begin, int64_t h_end, const ChannelBlock<A>& block, int64_t c_first,
                           const Filters<A, K>& filters) {
    const LaneFold<A> fold(block, c_first);
    for (int64_t h = h_begin; h < h_end; ++h) {
      Row<A> rows[K];
      for (int u = 0; u < K; ++u) {
        const int64_t reach = h + pad - u;  // S times the output row that tap u connects to row h
        const bool exists = reach % S == 0 && reach >= 0 && reach / S < shape.OH;
        rows[u] = {exists ? g_column0(reach / S - begin + halo) : nullptr, lanes};
      }
      A* target = d_memory + (h - h_begin) * d_row;
      input_gradient_row<A, K, S, false>(rows, filters.tap, shape.W, shape.OW, [&](int64_t w, Vector<A> v) {
        store(target + w * lanes, shape.mult == 1 ? v : load(target + w * lanes) + fold(v));
      });
    }
  }
};

// Input channels c_first ... c_first + channels - 1 of the samples [begin, end)
template <class T, int K, int S>
void depthwise_conv2d_backward_task(T* d_x,
                                    Accumulator<T>* sums,  // [blocks][K*K + 1][LANES] of these channels
                                    const T* d_y, const T* x,
                                    const Accumulator<T>* packed,  // like sums
                                    const DepthwiseShape& shape, int64_t c_first, int64_t channels, int64_t begin,
                                    int64_t end, Activation activation, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int64_t lanes = LANES<A>;
  const int64_t blocks = (channels * shape.mult + lanes - 1) / lanes;
  const int64_t x_sample = shape.C * shape.H * shape.W, y_sample = shape.O * shape.OH * shape.OW;
  for (int64_t i = 0; i < blocks * (K * K + 1) * lanes; ++i) sums[i] = 0;
  if constexpr (std::is_same_v<T, float> && S == 1) {
    if (channels_last && shape.mult == 1 && channels == lanes && activation == Activation::identity) {
      const Filters<A, K> filters(packed);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * x_sample + c_first;
        depthwise_conv2d_direct_backward<K>(d_x + at, sums, d_y + at, x + at, filters, shape);
      }
      return;
    }
  }
  BackwardStrips<T, K, S> strips(shape);
  for (int64_t b = begin; b < end; ++b) {
    strips.run(d_x + b * x_sample, sums, d_y + b * y_sample, x + b * x_sample, packed, c_first, channels, activation,
               channels_last);
  }
}

// Input channels of one task for this instruction set, so that with their multiplier they fill whole blocks; and the
// accumulators that the filters of an output channel take
template <class T>
void depthwise_conv2d_backward_steps(int64_t& channels, int64_t& part_size, const DepthwiseShape& shape) {
  constexpr int64_t lanes = LANES<Accumulator<T>>;
  int64_t common = lanes, b = shape.mult;  // greatest common divisor
  while (b != 0) {
    const int64_t rest = common % b;
    common = b;
    b = rest;
  }
  channels = lanes / common;
  part_size = (shape.O + lanes - 1) / lanes * lanes * (shape.K * shape.K + 1);
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter backward_calls("depthwise_conv2d_bwd");

std::tuple<Tensor, Tensor, Tensor> depthwise_conv2d_bwd(Tensor d_y_in, Tensor x_in, Tensor weight_in,
                                                        std::optional<Tensor> bias_in, int64_t stride,
                                                        std::string name) {
  const Arguments arguments = check_map("depthwise_conv2d_bwd", "x", x_in);
  arguments.depthwise(x_in, weight_in, bias_in, stride);
  arguments.tensor("d_y", d_y_in,
                   {x_in.size(0), weight_in.size(0), ceil_div(x_in.size(2), stride), ceil_div(x_in.size(3), stride)});
  const FeatureMap x = feature_map(x_in), d_y = feature_map_as(d_y_in, x.channels_last);
  const Tensor weight = as_contiguous(weight_in);                  // (O, 1, K, K)
  const Tensor bias = bias_in ? as_contiguous(*bias_in) : weight;  // (O), else not read
  const DepthwiseShape shape(x, weight, stride);
  const FeatureMap d_x = new_map(x, shape.C, shape.H, shape.W);
  const Tensor d_weight = new_tensor({shape.O, 1, shape.K, shape.K}, weight.scalar_type());
  const Tensor d_bias = new_tensor({shape.O}, weight.scalar_type());
  const Activation activation = activation_of(name);
  count_served(backward_calls);
  with_dtype(x_in.scalar_type(), [&]<class T>() {
    using A = Accumulator<T>;
    const T *x_data = data<T>(x.tensor), *d_y_data = data<T>(d_y.tensor), *weight_data = data<T>(weight);
    const T* bias_data = bias_in ? data<T>(bias) : nullptr;
    T* d_x_data = mutable_data<T>(d_x.tensor);
    int64_t channels, part_size;
    MF_CALL(depthwise_conv2d_backward_steps<T>(channels, part_size, shape));
    const int64_t groups = ceil_div(shape.C, channels), samples = shape.backward_samples();
    const int64_t parts = ceil_div(shape.B, samples), taps = shape.K * shape.K;
    Scratch<A> packed(part_size), sums(parts * part_size);  // parts are summed in order so that threads change nothing
    MF_CALL(pack_filters<T>(packed, weight_data, bias_data, shape.O, int(taps)));
    torch::stable::parallel_for(0, parts * groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t c = i % groups * channels, part = i / groups, b = part * samples;
        const int64_t filters = c * shape.mult * (taps + 1);
        with_window(shape, [&]<int K, int S>() {
          MF_CALL(depthwise_conv2d_backward_task<T, K, S>(
              d_x_data, sums + part * part_size + filters, d_y_data, x_data, packed + filters, shape, c,
              std::min(channels, shape.C - c), b, std::min(b + samples, shape.B), activation, x.channels_last));
        });
      }
    });
    MF_CALL(unpack_filter_gradients<T>(mutable_data<T>(d_weight), mutable_data<T>(d_bias), sums, parts, shape.O,
                                       int(taps)));
  });
  return {d_x.tensor, d_weight, d_bias};
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("depthwise_conv2d_bwd.native", TORCH_BOX(&mf::depthwise_conv2d_bwd));
}

#endif
