// Depthwise convolution with its activation on CPU. Source: mf_kernels/reference.py, depthwise_conv2d.
//
// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride,
// T stored type, A accumulator. A task walks down some rows of one block of LANES output channels of one sample, with
// the input rows it needs in a scratch that holds a vector of channels at every column.
#define MF_EACH_SET_FILE "cpu/depthwise_conv2d.cpp"
#include "cpu/depthwise_shape.h"
#include "cpu/slopes.h"
#include "cpu/isa.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"
#include "cpu/activation.isa.h"
#include "cpu/depthwise_filters.isa.h"
#include "cpu/depthwise_rows.isa.h"
#include "cpu/depthwise_products.isa.h"

namespace mf::MF_ISA {

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

// Output rows [begin, end) of a whole block of a channels_last sample of multiplier 1, read and written where it lies
template <int K, int S, Activation ACTIVATION>
void depthwise_conv2d_direct(float* y, const float* x,  // one sample
                             const Filters<float, K>& filters, const DepthwiseShape& shape, int64_t o, int64_t begin,
                             int64_t end, const Slopes<float>& slopes) {
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
    convolve_rows<float, K, S, ROWS, true>(rows, filters.tap, filters.bias, shape.OW, shape.W, emit);
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
                            RowRing<T> ring, const Filters<Accumulator<T>, K>& filters, int64_t begin, int64_t end,
                            Activation activation, const Slopes<Accumulator<T>>& slopes) {
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
    convolve_into<A, K, S, ROWS>(out, rows, filters.tap, filters.bias, shape.OW);
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
void depthwise_conv2d_tasks(T* y, const T* x,
                            const Accumulator<T>* packed,     // [blocks][K*K + 1][LANES]
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
    const Filters<A, K> filters(packed + o * (K * K + 1));
    Slopes<A> slopes{};
    if (slopes_in != nullptr) {
      slopes = {load(slopes_in + b * shape.O + o, block.used),
                load(slopes_in + (shape.B + b) * shape.O + o, block.used)};
    }

    if constexpr (std::is_same_v<T, float>) {
      if (channels_last && shape.mult == 1 && block.used == lanes) {
        with_activation(activation, [&]<Activation ACTIVATION>() {
          depthwise_conv2d_direct<K, S, ACTIVATION>(y_sample, sample, filters, shape, o, first, last, slopes);
        });
        continue;
      }
    }
    const int64_t from = first * S - K / 2;
    const RowRing<T> ring{shape, sample, block, channels_last, held, from < 0 ? 0 : from, memory};
    depthwise_conv2d_strip<T, K, S>(y_sample, out, ring, filters, first, last, activation, slopes);
  }
}

// Blocks of output channels for this instruction set
template <class T>
void depthwise_conv2d_blocks(int64_t& blocks, const DepthwiseShape& shape) {
  constexpr int64_t lanes = LANES<Accumulator<T>>;
  blocks = (shape.O + lanes - 1) / lanes;
}

}  // namespace mf::MF_ISA

#else

namespace mf {
namespace {

KernelCounter forward_calls("depthwise_conv2d_fwd"), depthwise_dynamic_relu_calls("depthwise_dynamic_relu");

Tensor forward(const Arguments& arguments, const Tensor& x_in, const Tensor& weight_in,
               const std::optional<Tensor>& bias_in, const std::optional<Tensor>& theta_in, int64_t stride,
               Activation activation) {
  arguments.depthwise(x_in, weight_in, bias_in, stride);
  if (theta_in) arguments.tensor("theta", *theta_in, {x_in.size(0), 2 * weight_in.size(0)});
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
    Scratch<A> packed(shape.packed_filters<A>());
    MF_CALL(pack_filters<T>(packed, weight_data, bias_data, shape.O, int(shape.K * shape.K)));
    int64_t blocks;
    MF_CALL(depthwise_conv2d_blocks<T>(blocks, shape));
    torch::stable::parallel_for(0, shape.B * blocks * shape.forward_strips(), 1, [&](int64_t begin, int64_t end) {
      with_window(shape, [&]<int K, int S>() {
        MF_CALL(depthwise_conv2d_tasks<T, K, S>(y_data, x_data, packed, slopes, shape, begin, end, activation,
                                                x.channels_last));
      });
    });
  });
  return y.tensor;
}

Tensor depthwise_conv2d_fwd(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t stride,
                            std::string activation) {
  const Arguments arguments = check_map("depthwise_conv2d_fwd", "x", x);
  const Activation wanted = activation_of(activation);
  count_served(forward_calls);
  return forward(arguments, x, weight, bias, std::nullopt, stride, wanted);
}

Tensor depthwise_dynamic_relu(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor theta, int64_t stride) {
  const Arguments arguments = check_map("depthwise_dynamic_relu", "x", x);
  count_served(depthwise_dynamic_relu_calls);
  return forward(arguments, x, weight, bias, theta, stride, Activation::dynamic_relu);
}

}  // namespace
}  // namespace mf

STABLE_TORCH_LIBRARY_IMPL(mf_kernels, CPU, m) {
  m.impl("depthwise_conv2d_fwd.native", TORCH_BOX(&mf::depthwise_conv2d_fwd));
  m.impl("depthwise_dynamic_relu.native", TORCH_BOX(&mf::depthwise_dynamic_relu));
}

#endif
