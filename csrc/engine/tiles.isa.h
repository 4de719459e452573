// Matrix products of bfloat16 maps by the CPU's matrix unit (AMX): a tile of up to 16 positions times one of 16 outputs,
// 32 inputs at a time. Map and weight may come in parts that add up to them; the products of all pairs of parts but
// the least ones then give what floats would have given. No include guard: once per instruction set.

namespace mf::engine::MF_ISA {

#if defined(MF_ISA_TILES)

constexpr int TILE = 16;            // rows of a tile, at most
constexpr int SUMS = TILE * LANES;  // floats of one

struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Registers 0 to 5 hold sums, vector by vector for two tiles of positions; 6 holds positions, 7 weights. The names of
// registers are part of the instructions.
template <int REGISTER>
MF_INLINE void clear_sums() {
  if constexpr (REGISTER == 0) _tile_zero(0);
  if constexpr (REGISTER == 1) _tile_zero(1);
  if constexpr (REGISTER == 2) _tile_zero(2);
  if constexpr (REGISTER == 3) _tile_zero(3);
  if constexpr (REGISTER == 4) _tile_zero(4);
  if constexpr (REGISTER == 5) _tile_zero(5);
}

template <int REGISTER>
MF_INLINE void add_products() {
  if constexpr (REGISTER == 0) _tile_dpbf16ps(0, 6, 7);
  if constexpr (REGISTER == 1) _tile_dpbf16ps(1, 6, 7);
  if constexpr (REGISTER == 2) _tile_dpbf16ps(2, 6, 7);
  if constexpr (REGISTER == 3) _tile_dpbf16ps(3, 6, 7);
  if constexpr (REGISTER == 4) _tile_dpbf16ps(4, 6, 7);
  if constexpr (REGISTER == 5) _tile_dpbf16ps(5, 6, 7);
}

template <int REGISTER>
MF_INLINE void store_sums(float* sums) {
  constexpr int row = LANES * sizeof(float);
  if constexpr (REGISTER == 0) _tile_stored(0, sums, row);
  if constexpr (REGISTER == 1) _tile_stored(1, sums, row);
  if constexpr (REGISTER == 2) _tile_stored(2, sums, row);
  if constexpr (REGISTER == 3) _tile_stored(3, sums, row);
  if constexpr (REGISTER == 4) _tile_stored(4, sums, row);
  if constexpr (REGISTER == 5) _tile_stored(5, sums, row);
}

constexpr int TILE_ROW = BF16_RUN * sizeof(uint16_t);  // bytes

MF_INLINE void load_positions(const uint16_t* from) { _tile_loadd(6, from, TILE_ROW); }
MF_INLINE void load_weights(const uint16_t* from) { _tile_loadd(7, from, TILE_ROW); }

template <int VECTORS, int TILES, class F>
MF_INLINE void for_registers(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) {
    (f.template operator()<I / TILES * 2 + I % TILES>(), ...);
  }(std::make_integer_sequence<int, VECTORS * TILES>{});
}

// Sums of one or two tiles of positions, a[0] and a[1] their first ones
template <int VECTORS, int TILES>
MF_INLINE void multiply(const Products& p, const uint16_t* const (&a)[2], const uint16_t* weight, Prefetch& prefetch) {
  for_registers<VECTORS, TILES>([]<int REGISTER>() { clear_sums<REGISTER>(); });
  for (int k = 0; k < p.depth; ++k) {
    for (int j = 0; j < p.parts; ++j, weight += VECTORS * 2 * SUMS) {
      for (int i = 0; i + j < p.parts; ++i) {
        const ptrdiff_t from = p.offsets[k] + i * p.part_size;
        for (int line = 0; line < VECTORS; ++line) prefetch_line(prefetch);
        load_positions(a[0] + from);
        [&]<int... V>(std::integer_sequence<int, V...>) {
          ((load_weights(weight + V * 2 * SUMS), add_products<2 * V>()), ...);
        }(std::make_integer_sequence<int, VECTORS>{});
        if constexpr (TILES == 2) {
          load_positions(a[1] + from);
          // from the last vector back: its weights are there already
          add_products<2 * VECTORS - 1>();
          [&]<int... V>(std::integer_sequence<int, V...>) {
            ((load_weights(weight + (VECTORS - 2 - V) * 2 * SUMS), add_products<2 * (VECTORS - 2 - V) + 1>()), ...);
          }(std::make_integer_sequence<int, VECTORS - 1>{});
        }
      }
    }
  }
}

// What becomes of the sums [rows][16] of one vector, from `position` on
template <bool DYNAMIC, bool RESIDUAL>
inline void finish_sums(const float* sums, int rows, const Epilogue& e, int vector, int position) {
  const int channel = vector * LANES;
  const V bias = e.bias ? load(e.bias + channel) : V{};
  const V slope1 = DYNAMIC ? load(e.slope1 + channel) : V{}, slope2 = DYNAMIC ? load(e.slope2 + channel) : V{};
  int y = position / e.width, x = position % e.width;
  const Bfloat16Map to = e.bf16;
  uint16_t* rounded = e.bf16.data ? bf16_at(e.bf16, vector, position) : nullptr;
  for (int row = 0; row < rows; ++y, x = 0) {
    const int here = rows - row < e.width - x ? rows - row : e.width - x;  // until the map's row ends
    const float* residual =
        RESIDUAL ? e.residual + vector * e.residual_block + y * e.residual_row + ptrdiff_t(x) * BLOCK : nullptr;
    float* out = e.out ? e.out + vector * e.out_block + y * e.out_row + ptrdiff_t(x) * BLOCK : nullptr;
    for (int r = 0; r < here; ++r) {
      V value = load(sums + (row + r) * LANES) + bias;
      value = DYNAMIC ? maximum(value * slope1, value * slope2) : activate(value, e.act);
      if (RESIDUAL) value += load(residual + r * BLOCK);
      if (out) store(out + r * BLOCK, value);
      if (rounded) store_bf16(to, rounded + (row + r) * BF16_RUN, value);
    }
    row += here;
  }
}

// Positions [begin, end) of one panel, two tiles of `rows` of them at a time. The last ones overlap those before, and
// say the same there.
template <int VECTORS>
inline void tiles_of(const Products& p, const Epilogue& e, const uint16_t* a, int begin, int end, int rows,
                     const uint16_t* weight, int vector) {
  alignas(64) float made[VECTORS * 2 * SUMS];
  int positions[2] = {}, tiles = 0;
  Prefetch prefetch = p.prefetch ? *p.prefetch : Prefetch{};
  // The sums before are finished while the matrix unit is at work on the next ones.
  const auto finish = [&]() __attribute__((always_inline)) {
    for (int t = 0; t < tiles; ++t) {
      for (int v = 0; v < VECTORS; ++v) {
        const float* sums = made + (2 * v + t) * SUMS;
        if (e.act == Act::dynamic_relu) {
          finish_sums<true, false>(sums, rows, e, vector + v, positions[t]);
        } else if (e.residual) {
          finish_sums<false, true>(sums, rows, e, vector + v, positions[t]);
        } else {
          finish_sums<false, false>(sums, rows, e, vector + v, positions[t]);
        }
      }
    }
  };
  for (int at = begin; at < end; at += 2 * rows) {
    const int next[2] = {at < end - rows ? at : end - rows, at + rows < end - rows ? at + rows : end - rows};
    const uint16_t* const from[2] = {a + ptrdiff_t(next[0]) * BF16_RUN, a + ptrdiff_t(next[1]) * BF16_RUN};
    const int count = at + rows < end ? 2 : 1;
    count == 2 ? multiply<VECTORS, 2>(p, from, weight, prefetch) : multiply<VECTORS, 1>(p, from, weight, prefetch);
    finish();
    const auto keep = [&]<int REGISTER>() { store_sums<REGISTER>(made + REGISTER * SUMS); };
    count == 2 ? for_registers<VECTORS, 2>(keep) : for_registers<VECTORS, 1>(keep);
    positions[0] = next[0];
    positions[1] = next[1];
    tiles = count;
  }
  finish();
  if (p.prefetch) p.prefetch->at = prefetch.at;
}

// Rows of a tile for so many positions: as many as leave the least to do twice
inline int rows_of_tile(int positions) {
  int best = 0, least = 0;
  for (int tiles = (positions + TILE - 1) / TILE, more = 0; more < 3; ++tiles, ++more) {
    const int rows = (positions + tiles - 1) / tiles;
    if (best == 0 || rows * tiles < least) best = rows, least = rows * tiles;
  }
  return best;
}

inline void tiles(const Products& p, const Epilogue& e, const uint16_t* a, int begin, int end, int first, int last) {
  if (begin >= end) return;
  const int rows = rows_of_tile(end - begin);
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) {
    shapes.row_bytes[i] = 64;
    shapes.rows[i] = uint8_t(i == 7 ? TILE : rows);
  }
  _tile_loadconfig(&shapes);
  for (int i = first; i < last; ++i) {
    const int vector = first_vector(p.vectors, i);
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + ptrdiff_t(vector) * p.depth * p.parts * 2 * SUMS;
    switch (panel_vectors(p.vectors, i)) {
      case 3: tiles_of<3>(p, e, a, begin, end, rows, weight, vector); break;
      case 2: tiles_of<2>(p, e, a, begin, end, rows, weight, vector); break;
      default: tiles_of<1>(p, e, a, begin, end, rows, weight, vector); break;
    }
  }
  _tile_release();  // nobody has to save what nobody needs
}

#endif

}  // namespace mf::engine::MF_ISA
