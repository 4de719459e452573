// Rows of a feature map as the depthwise kernels read them: one vector of output channels at every column, whatever
// the layout, the dtype and the channel multiplier. Included once per instruction set, after vector.h.
//
// Legend: T stored type, A accumulator, a block is LANES<A> neighbouring output channels o; o reads channel o / mult.

namespace mf::MF_ISA {

// The output channels o ... o + used - 1, one a lane, and where their input channels are
template <class A>
struct ChannelBlock {
  int64_t o, mult;
  int used;               // lanes that exist; what the others compute is never stored
  int64_t c;              // input channel of the first lane
  int span;               // input channels that the lanes read
  IntegerVector<A> from;  // lane -> input channel, counted from c

  ChannelBlock(int64_t first, int64_t outputs, int64_t multiplier) : o(first), mult(multiplier) {
    used = int(outputs - o < LANES<A> ? outputs - o : LANES<A>);
    c = o / mult;
    typename VectorTypes<A>::lane_integer lane_from[LANES<A>] = {};
    int64_t channel = 0, filter = o % mult;
    for (int i = 0; i < used; ++i) {
      lane_from[i] = channel;
      if (++filter == mult) filter = 0, ++channel;
    }
    span = int(lane_from[used - 1]) + 1;
    __builtin_memcpy(&from, lane_from, sizeof(from));
  }
};

template <class A>
MF_INLINE Vector<A> permute(Vector<A> v, IntegerVector<A> from) {
#if defined(__clang__)
  Vector<A> result;
  for (int i = 0; i < LANES<A>; ++i) result[i] = v[from[i]];
  return result;
#else
  return __builtin_shuffle(v, from);
#endif
}

// row[w][lane] = x[h][w] of the block's input channels; lanes that do not exist hold anything
template <class T>
void load_row(Accumulator<T>* row,  // [W][LANES]
              const T* x,           // one sample
              int64_t h, int64_t W, int64_t C, int64_t H, const ChannelBlock<Accumulator<T>>& block,
              bool channels_last) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (channels_last) {
    const T* source = x + h * W * C;
    if (C < lanes) {
      for (int64_t w = 0; w < W; ++w) {
        store(row + w * lanes, permute<A>(load(source + w * C + block.c, block.span), block.from));
      }
      return;
    }
    // A vector that ends with the position's last channel at the latest: whole loads, aligned ones where C allows
    const int64_t start = block.c < C - lanes ? block.c : C - lanes;
    if (block.mult == 1 && start == block.c) {
      for (int64_t w = 0; w < W; ++w) store(row + w * lanes, load(source + w * C + start));
    } else {
      const IntegerVector<A> from = block.from + typename VectorTypes<A>::lane_integer(block.c - start);
      for (int64_t w = 0; w < W; ++w) store(row + w * lanes, permute<A>(load(source + w * C + start), from));
    }
    return;
  }
  for (int64_t w = 0; w < W; w += lanes) {
    const int columns = int(W - w < lanes ? W - w : lanes);
    Vector<A> square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      square[i] = i < block.used ? load(x + ((block.c + block.from[i]) * H + h) * W + w, columns) : Vector<A>{};
    }
    transpose(square);
    for (int i = 0; i < columns; ++i) store(row + (w + i) * lanes, square[i]);
  }
}

// y[h][w] of the channels c ... c + used - 1 = row[w][lane], rounded to T
template <class T>
void store_row(T* y,                       // one sample of C channels
               const Accumulator<T>* row,  // [W][LANES]
               int64_t h, int64_t W, int64_t C, int64_t H, int64_t c, int used, bool channels_last) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (channels_last) {
    for (int64_t w = 0; w < W; ++w) store(y + (h * W + w) * C + c, load(row + w * lanes), used);
    return;
  }
  for (int64_t w = 0; w < W; w += lanes) {
    const int columns = int(W - w < lanes ? W - w : lanes);
    Vector<A> square[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) square[i] = i < columns ? load(row + (w + i) * lanes) : Vector<A>{};
    transpose(square);
    for (int i = 0; i < used; ++i) store(y + ((c + i) * H + h) * W + w, square[i], columns);
  }
}

}  // namespace mf::MF_ISA
