// Depthwise 3 x 3 convolution of one block of channels, its norm folded, its activation in the same pass. No include
// guard: once per instruction set.

namespace mf::engine::MF_ISA {

constexpr int DEPTHWISE_TILE = MF_ISA_REGISTERS == 32 ? 14 : 6;  // outputs of a row at once

// Outputs [x, x + WIDTH) of row y, one vector of the block's channels
template <int STRIDE, int WIDTH>
MF_INLINE void depthwise_tile(const Depthwise& d, int y, int x, int lane) {
  V sums[WIDTH];
  const V bias = load(d.bias + lane);
#pragma GCC unroll 16
  for (int i = 0; i < WIDTH; ++i) sums[i] = bias;
#pragma GCC unroll 3
  for (int r = 0; r < 3; ++r) {
    const float* in = d.in + (ptrdiff_t(y) * STRIDE + r - 1) * d.in_row + (ptrdiff_t(x) * STRIDE - 1) * BLOCK + lane;
    const V w0 = load(d.weight + (3 * r + 0) * BLOCK + lane);
    const V w1 = load(d.weight + (3 * r + 1) * BLOCK + lane);
    const V w2 = load(d.weight + (3 * r + 2) * BLOCK + lane);
#pragma GCC unroll 32
    for (int c = 0; c < STRIDE * (WIDTH - 1) + 3; ++c) {
      const V value = load(in + c * BLOCK);
      if (c % STRIDE == 0 && c / STRIDE < WIDTH) sums[c / STRIDE] += value * w0;
      if (c >= 1 && (c - 1) % STRIDE == 0 && (c - 1) / STRIDE < WIDTH) sums[(c - 1) / STRIDE] += value * w1;
      if (c >= 2 && (c - 2) % STRIDE == 0 && (c - 2) / STRIDE < WIDTH) sums[(c - 2) / STRIDE] += value * w2;
    }
  }
  const ptrdiff_t at = (ptrdiff_t(y) * d.width + x) * BLOCK + lane;
  if (d.act == Act::dynamic_relu) {
    const V slope1 = load(d.slope1 + lane), slope2 = load(d.slope2 + lane);
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) sums[i] = maximum(sums[i] * slope1, sums[i] * slope2);
  } else if (d.act == Act::relu6) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) sums[i] = clamp(sums[i], 0.0f, 6.0f);
  }
  if (d.out) {
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) store(d.out + at + i * BLOCK, sums[i]);
  }
  if (d.bf16.data) store_bf16(d.bf16, bf16_at(d.bf16, d.bf16_block, ptrdiff_t(y) * d.width + x) + lane, sums);
}

// A row in tiles of one width; the last one overlaps the one before it, and says the same there
template <int STRIDE, int WIDTH>
inline void depthwise_rows(const Depthwise& d, int first, int last) {
  Prefetch prefetch = d.prefetch ? *d.prefetch : Prefetch{};
  for (int lane = 0; lane < BLOCK; lane += LANES) {
    for (int y = first; y < last; ++y) {
      for (int x = 0; x < d.width; x += WIDTH) {
        for (int line = 0; line < WIDTH; line += 4) prefetch_line(prefetch);
        depthwise_tile<STRIDE, WIDTH>(d, y, x + WIDTH <= d.width ? x : d.width - WIDTH, lane);
      }
    }
  }
  if (d.prefetch) d.prefetch->at = prefetch.at;
}

template <int STRIDE>
inline void depthwise_of(const Depthwise& d, int first, int last) {
  if (d.width % DEPTHWISE_TILE == 0) return depthwise_rows<STRIDE, DEPTHWISE_TILE>(d, first, last);
  if (DEPTHWISE_TILE > 7 && d.width >= 7) return depthwise_rows<STRIDE, 7>(d, first, last);
  if (d.width >= 4) return depthwise_rows<STRIDE, 4>(d, first, last);
  if (d.width >= 2) return depthwise_rows<STRIDE, 2>(d, first, last);
  depthwise_rows<STRIDE, 1>(d, first, last);
}

inline void depthwise(const Depthwise& d, int first, int last) {
  d.stride == 1 ? depthwise_of<1>(d, first, last) : depthwise_of<2>(d, first, last);
}

}  // namespace mf::engine::MF_ISA
