// Matrix products of a map with a weight: pointwise convolutions and linear layers. A tile of positions times a panel
// of outputs is kept in registers while the inputs pass. No include guard: once per instruction set.

namespace mf::engine::MF_ISA {

// Positions of a tile for a panel of so many vectors: with its sums, the panel's weights and one input, it fills the
// registers.
constexpr int tile_rows(int vectors) {
  return MF_ISA_REGISTERS == 32 ? (vectors == 3   ? 7
                                   : vectors == 2 ? 12
                                                  : 14)
                                : (vectors == 3   ? 4
                                   : vectors == 2 ? 6
                                                  : 8);
}

// The same where the last vector is half empty
constexpr int tail_rows(int vectors) { return vectors == 3 ? 7 : 14; }

// What becomes of the sums of a tile; its first position is column x of row y
template <int ROWS, int VECTORS>
MF_INLINE void finish(V (&sums)[ROWS][VECTORS], const Epilogue& e, int vector, int position, int y, int x) {
  ptrdiff_t out_at[ROWS], residual_at[ROWS];
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) {
    out_at[r] = y * e.out_row + ptrdiff_t(x) * BLOCK;
    residual_at[r] = y * e.residual_row + ptrdiff_t(x) * BLOCK;
    if (++x == e.width) x = 0, ++y;
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    const int channel = (vector + v) * LANES;
    const ptrdiff_t block = channel / BLOCK;
    const int lane = channel % BLOCK;
    if (e.bias) {
      const V bias = load(e.bias + channel);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r][v] += bias;
    }
    if (e.act == Act::dynamic_relu) {
      const V slope1 = load(e.slope1 + channel), slope2 = load(e.slope2 + channel);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r][v] = maximum(sums[r][v] * slope1, sums[r][v] * slope2);
    } else if (e.act != Act::identity) {
      // Through an array of its own: a loop that is not unrolled would keep all sums in memory, from their zeros on
      V some[ROWS];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) some[r] = sums[r][v];
      for (int r = 0; r < ROWS; ++r) some[r] = activate(some[r], e.act);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r][v] = some[r];
    }
    if (e.residual) {
      const float* from = e.residual + block * e.residual_block + lane;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[r][v] += load(from + residual_at[r]);
    }
    if (e.out) {
      float* to = e.out + block * e.out_block + lane;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) store(to + out_at[r], sums[r][v]);
    }
    if (e.bf16.data) {
      uint16_t* to = bf16_at(e.bf16, block, position) + lane;
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) store_bf16(e.bf16, to + r * BF16_RUN, sums[r][v]);
    }
  }
}

// acc += a pair of bfloat16 inputs times their two weights, lane by lane
MF_INLINE V add_pair(V acc, VI a, const uint16_t* weight) {
#if defined(MF_ISA_PAIRS)
  return (V)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)_mm512_loadu_si512(weight));
#else
  VI w;
  __builtin_memcpy(&w, weight, sizeof(w));
  acc += (V)(a << 16) * (V)(w << 16);
  return acc + (V)(a & int32_t(0xffff0000)) * (V)(w & int32_t(0xffff0000));
#endif
}

#if defined(MF_ISA_AVX512)
template <class Half, class Whole>
MF_INLINE Half lower(Whole v) {
  Half half;
  __builtin_memcpy(&half, &v, sizeof(half));
  return half;
}

MF_INLINE __m256 add_pair(__m256 acc, __m256i a, const uint16_t* weight) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weight));
#if defined(MF_ISA_PAIRS)
  return _mm256_dpbf16_ps(acc, (__m256bh)a, (__m256bh)w);
#else
  acc = _mm256_fmadd_ps((__m256)_mm256_slli_epi32(a, 16), (__m256)_mm256_slli_epi32(w, 16), acc);
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000));
  return _mm256_fmadd_ps((__m256)_mm256_and_si256(a, upper), (__m256)_mm256_and_si256(w, upper), acc);
#endif
}
#endif

template <Format FORMAT, int ROWS, int VECTORS, int SETS>
inline void tile(const Products& p, const Epilogue& e, const char* a, ptrdiff_t stride, const char* weight, int vector,
                 int position, int y, int x) {
  V sums[SETS][ROWS][VECTORS] = {};
  const int32_t* offsets = p.offsets;
  Prefetch prefetch = p.prefetch ? *p.prefetch : Prefetch{};
  const auto step = [&](int k, V(&to)[ROWS][VECTORS]) __attribute__((always_inline)) {
    if constexpr (FORMAT == Format::bf16) {
      const uint16_t* w = reinterpret_cast<const uint16_t*>(weight) + ptrdiff_t(k) * VECTORS * LANES * 2;
      const uint16_t* from = reinterpret_cast<const uint16_t*>(a) + offsets[k];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, from + r * stride, sizeof(pair));
        const VI both = pair - VI{};
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) to[r][v] = add_pair(to[r][v], both, w + v * LANES * 2);
      }
    } else {
      V w[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const ptrdiff_t at = (ptrdiff_t(k) * VECTORS + v) * LANES;
        w[v] = FORMAT == Format::f32 ? load(reinterpret_cast<const float*>(weight) + at)
                                     : load_integers(reinterpret_cast<const int16_t*>(weight) + at);
      }
      const float* from = reinterpret_cast<const float*>(a) + offsets[k];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const V input = broadcast(from[r * stride]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) to[r][v] += input * w[v];
      }
    }
  };
  int k = 0;
  if constexpr (SETS > 1) {
    for (; k + SETS <= p.depth; k += SETS) {
#pragma GCC unroll 4
      for (int s = 0; s < SETS; ++s) step(k + s, sums[s]);
    }
  }
  for (; k < p.depth; ++k) {
    if constexpr (SETS == 1) prefetch_line(prefetch);
    step(k, sums[0]);
  }
  if (SETS == 1 && p.prefetch) p.prefetch->at = prefetch.at;
#pragma GCC unroll 3
  for (int s = 1; s < SETS; ++s) {
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sums[0][r][v] += sums[s][r][v];
    }
  }
  if constexpr (FORMAT == Format::i16_weight) {
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      const V scale = load(p.scale + (vector + v) * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) sums[0][r][v] *= scale;
    }
  }
  finish(sums[0], e, vector, position, y, x);
}

#if defined(MF_ISA_AVX512)
// tile() where only the lower half of the last vector is outputs: half a vector takes half the time. Only for maps.
template <Format FORMAT, int ROWS, int VECTORS>
inline void tile_with_tail(const Products& p, const Epilogue& e, const char* a, const char* weight, int vector,
                           int position, int y, int x) {
  constexpr int WHOLE = VECTORS - 1;
  V sums[ROWS][VECTORS] = {};
  __m256 tails[ROWS] = {};
  Prefetch prefetch = p.prefetch ? *p.prefetch : Prefetch{};
  for (int k = 0; k < p.depth; ++k, weight += VECTORS * LANES * 4) {
    prefetch_line(prefetch);
    if constexpr (FORMAT == Format::bf16) {
      const uint16_t* w = reinterpret_cast<const uint16_t*>(weight);
      const uint16_t* from = reinterpret_cast<const uint16_t*>(a) + p.offsets[k];
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        int32_t pair;
        __builtin_memcpy(&pair, from + r * BLOCK, sizeof(pair));
        const VI both = pair - VI{};
#pragma GCC unroll 4
        for (int v = 0; v < WHOLE; ++v) sums[r][v] = add_pair(sums[r][v], both, w + v * LANES * 2);
        tails[r] = add_pair(tails[r], lower<__m256i>(both), w + WHOLE * LANES * 2);
      }
    } else {
      const float* w = reinterpret_cast<const float*>(weight);
      const float* from = reinterpret_cast<const float*>(a) + p.offsets[k];
      const __m256 tail = _mm256_loadu_ps(w + WHOLE * LANES);
#pragma GCC unroll 16
      for (int r = 0; r < ROWS; ++r) {
        const V input = broadcast(from[r * BLOCK]);
#pragma GCC unroll 4
        for (int v = 0; v < WHOLE; ++v) sums[r][v] += input * load(w + v * LANES);
        // read twice where that is two operands of multiply-adds, and no instruction of its own
        const __m256 same = WHOLE == 2 ? lower<__m256>(input) : _mm256_set1_ps(from[r * BLOCK]);
        tails[r] = _mm256_fmadd_ps(same, tail, tails[r]);
      }
    }
  }
  if (p.prefetch) p.prefetch->at = prefetch.at;
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r) sums[r][WHOLE] = (V)_mm512_insertf32x8(_mm512_setzero_ps(), tails[r], 0);
  finish(sums, e, vector, position, y, x);
}

template <Format FORMAT, int VECTORS, int ROWS = tail_rows(VECTORS)>
inline void tile_with_tail_of(int rows, const Products& p, const Epilogue& e, const char* a, const char* weight,
                              int vector, int position, int y, int x) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile_with_tail_of<FORMAT, VECTORS, ROWS - 1>(rows, p, e, a, weight, vector, position, y, x);
  }
  tile_with_tail<FORMAT, ROWS, VECTORS>(p, e, a, weight, vector, position, y, x);
}
#endif

template <Format FORMAT, int VECTORS, int ROWS = tile_rows(VECTORS)>
inline void tile_of(int rows, const Products& p, const Epilogue& e, const char* a, ptrdiff_t stride, const char* weight,
                    int vector, int position, int y, int x) {
  if constexpr (ROWS > 1) {
    if (rows < ROWS) return tile_of<FORMAT, VECTORS, ROWS - 1>(rows, p, e, a, stride, weight, vector, position, y, x);
  }
  // In maps the distance is known, and addresses cost nothing. Rows of tokens are few, and with too few sums each waits
  // for the one before it: inputs then go to several sets of them in turn. Not in maps, where a tile may be short only
  // for one number of threads, and results must be the same for all.
  if constexpr (FORMAT != Format::i16_weight) {
    if (FORMAT == Format::bf16 || stride == BLOCK) {
      return tile<FORMAT, ROWS, VECTORS, 1>(p, e, a, BLOCK, weight, vector, position, y, x);
    }
  }
  if constexpr (FORMAT != Format::bf16) {
    constexpr int sets = ROWS == 1 ? 4 : ROWS * VECTORS < 8 ? 2 : 1;
    tile<FORMAT, ROWS, VECTORS, sets>(p, e, a, stride, weight, vector, position, y, x);
  }
}

template <Format FORMAT, int VECTORS>
inline void panel(const Products& p, const Epilogue& e, const char* a, ptrdiff_t stride, int begin, int end,
                  int vector) {
  constexpr int rows = tile_rows(VECTORS);
  constexpr int element = FORMAT == Format::bf16 ? 2 : 4;
  // floats are 4 bytes, a pair of bfloat16 too; a 16-bit integer is 2
  const char* weight =
      static_cast<const char*>(p.weight) + ptrdiff_t(vector) * LANES * p.depth * (FORMAT == Format::i16_weight ? 2 : 4);
  int y = begin / e.width, x = begin % e.width;
#if defined(MF_ISA_AVX512)
  if constexpr (FORMAT != Format::i16_weight) {
    if (p.half_tail && vector + VECTORS == p.vectors && stride == BLOCK) {
      constexpr int tall = tail_rows(VECTORS);
      for (int position = begin; position < end; position += tall) {
        tile_with_tail_of<FORMAT, VECTORS>(end - position, p, e, a + position * BLOCK * element, weight, vector,
                                           position, y, x);
        for (x += tall; x >= e.width; x -= e.width) ++y;
      }
      return;
    }
  }
#endif
  // How a tile of few rows is summed depends on their number, so an image's own must not depend on its neighbours.
  for (int position = begin, count; position < end; position += count) {
    const int left = p.rows > 0 ? p.rows - (position - begin) % p.rows : end - position;
    count = left < rows ? left : rows;
    tile_of<FORMAT, VECTORS>(count, p, e, a + position * stride * element, stride, weight, vector, position, y, x);
    for (x += count; x >= e.width; x -= e.width) ++y;
  }
}

template <Format FORMAT>
inline void panels(const Products& p, const Epilogue& e, const char* a, ptrdiff_t stride, int begin, int end, int first,
                   int last) {
  // Inputs of so many positions stay in the second-level cache while all panels pass.
  constexpr int strip_bytes = 256 * 1024;
  const int bytes = p.depth * 4;
  int strip = strip_bytes / bytes / 84 * 84;  // a whole number of tiles of every height
  if (strip < 84) strip = 84;
  for (int at = begin; at < end; at += strip) {
    const int until = at + strip < end ? at + strip : end;
    for (int i = first; i < last; ++i) {
      const int vector = first_vector(p.vectors, i);
      switch (panel_vectors(p.vectors, i)) {
        case 3: panel<FORMAT, 3>(p, e, a, stride, at, until, vector); break;
        case 2: panel<FORMAT, 2>(p, e, a, stride, at, until, vector); break;
        default: panel<FORMAT, 1>(p, e, a, stride, at, until, vector); break;
      }
    }
  }
}

inline void pointwise(const Products& p, const Epilogue& e, const void* a, ptrdiff_t stride, int begin, int end,
                      int first, int last) {
  [[maybe_unused]] const char* from = static_cast<const char*>(a);
#if defined(MF_ISA_TILES)
  if (p.format == Format::bf16) return tiles(p, e, static_cast<const uint16_t*>(a), begin, end, first, last);
#else
  if (p.format == Format::bf16) return panels<Format::bf16>(p, e, from, stride, begin, end, first, last);
#endif
#if defined(MF_ISA_REST)
  MF_ISA_REST::pointwise(p, e, a, stride, begin, end, first, last);
#else
  p.format == Format::f32 ? panels<Format::f32>(p, e, from, stride, begin, end, first, last)
                          : panels<Format::i16_weight>(p, e, from, stride, begin, end, first, last);
#endif
}

}  // namespace mf::engine::MF_ISA
