// The first convolution, 3 x 3 of stride 2 on a few channels: vectors of positions, since there are hardly any channels
// to fill one. Rows come split into even and odd columns, so that a window's column is one load. No include guard: once
// per instruction set.

namespace mf::engine::MF_ISA {

// Columns 0 2 4 ... and 1 3 5 ... of a row with a zero before it and one after; each of at least W / 2 + 1 floats
inline void split_row(const float* row, int W, float* even, float* odd) {
  const int whole = W / 2;
  even[0] = 0;
  int i = 0;
  for (; i + LANES <= whole; i += LANES) {
    const V a = load(row + 2 * i), b = load(row + 2 * i + LANES);
    store(odd + i, pick<0, 2>(a, b, IntegerSequence<LANES>{}));
    store(even + i + 1, pick<1, 2>(a, b, IntegerSequence<LANES>{}));
  }
  for (; i < whole; ++i) {
    odd[i] = row[2 * i];
    even[i + 1] = row[2 * i + 1];
  }
  odd[whole] = W % 2 ? row[W - 1] : 0.0f;
  if (W % 2) even[whole + 1] = 0;
}

// COUNT channels, whose weights [channels][3][3][COUNT] lie together, at LANES positions
template <int COUNT>
MF_INLINE void stem_tile(const Stem& s, const float* weight, const float* bias, int x, float* out) {
  V sums[COUNT];
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n) sums[n] = broadcast(bias[n]);
  for (int c = 0; c < s.channels; ++c) {
    for (int r = 0; r < 3; ++r, weight += 3 * COUNT) {
      const float* even = s.rows[r] + (2 * c) * s.half + x;
      const float* odd = even + s.half;
      const V columns[3] = {load(even), load(odd), load(even + 1)};
#pragma GCC unroll 3
      for (int k = 0; k < 3; ++k) {
#pragma GCC unroll 16
        for (int n = 0; n < COUNT; ++n) sums[n] += columns[k] * broadcast(weight[k * COUNT + n]);
      }
    }
  }
  V square[LANES] = {};
#pragma GCC unroll 16
  for (int n = 0; n < COUNT; ++n) square[n] = clamp(sums[n], 0.0f, 6.0f);
  transpose(square);
#pragma GCC unroll 16
  for (int p = 0; p < LANES; ++p) store(out + p * BLOCK, square[p]);
}

template <int COUNT>
inline void stem_channels(int count, const Stem& s, int first, int width, float* out) {
  if constexpr (COUNT > 4) {
    if (count < COUNT) return stem_channels<COUNT - 4>(count, s, first, width, out);
  }
  for (int begin = 0; begin < width; begin += LANES) {
    const int x = begin + LANES <= width ? begin : width - LANES;  // a row has at least 16 positions
    stem_tile<COUNT>(s, s.weight + ptrdiff_t(first) * 9 * s.channels, s.bias + first, x, out + ptrdiff_t(x) * BLOCK);
  }
}

inline void stem(const Stem& s, int width, float* out, ptrdiff_t out_block) {
  for (int n = 0; n < s.outputs; n += LANES) {
    const int count = s.outputs - n < LANES ? s.outputs - n : LANES;
    stem_channels<LANES>(count, s, n, width, out + n / BLOCK * out_block + n % BLOCK);
  }
}

}  // namespace mf::engine::MF_ISA
