// A tile: some channels of some consecutive positions of a feature map, one channel a row, positions on the lanes,
// in the accumulator's type. Both layouts and all dtypes become this once, so the attention kernels are written once.
// Included once per instruction set, after vector.h.
//
// Legend: T stored type, A accumulator. A map slice is a pointer to its first (channel, position) and two strides.

namespace mf::MF_ISA {

// What the attention kernels keep of a map slice in the first- and second-level cache
constexpr int64_t TILE_BYTES = 64 * 1024;
constexpr int TILE_POSITIONS = 256;

// Positions of one tile of `channels` rows: a multiple of the lanes, at most TILE_POSITIONS
template <class A>
int tile_positions(int64_t channels, int64_t positions) {
  const int64_t fit = TILE_BYTES / int64_t(sizeof(A)) / channels;
  const int64_t wanted = positions < TILE_POSITIONS ? positions : TILE_POSITIONS;
  const int64_t chosen = fit < wanted ? fit : wanted;
  return int(chosen <= LANES<A> ? LANES<A> : (chosen + LANES<A> - 1) / LANES<A> * LANES<A>);
}

// tile[c][p] for p < count; zeros from count up to the next multiple of the lanes
template <class T>
void load_tile(Accumulator<T>* tile,  // [channels][tile_stride]
               int64_t tile_stride, int64_t channels, int64_t count,
               const T* source,  // first channel, first position
               int64_t channel_stride, int64_t position_stride) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (position_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < count; p += lanes) {
        store(tile + c * tile_stride + p,
              load(source + c * channel_stride + p, int(count - p < lanes ? count - p : lanes)));
      }
    }
    return;
  }
  for (int64_t p = 0; p < count; p += lanes) {  // channels are neighbours: transpose squares
    const int rows = int(count - p < lanes ? count - p : lanes);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int columns = int(channels - c < lanes ? channels - c : lanes);
      const T* corner = source + p * position_stride + c;
      Vector<A> square[lanes];
      if (rows == lanes && columns == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(corner + i * position_stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) {
          square[i] = i < rows ? load(corner + i * position_stride, columns) : Vector<A>{};
        }
      }
      transpose(square);
      A* target = tile + c * tile_stride + p;
      if (columns == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(target + i * tile_stride, square[i]);
      } else {
        for (int i = 0; i < columns; ++i) store(target + i * tile_stride, square[i]);
      }
    }
  }
}

// The inverse: writes tile[c][p] for p < count into the map, rounding to T
template <class T>
void store_tile(const Accumulator<T>* tile,  // [channels][tile_stride]
                int64_t tile_stride, int64_t channels, int64_t count,
                T* target,  // first channel, first position
                int64_t channel_stride, int64_t position_stride) {
  using A = Accumulator<T>;
  constexpr int lanes = LANES<A>;
  if (position_stride == 1) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t p = 0; p < count; p += lanes) {
        store(target + c * channel_stride + p, load(tile + c * tile_stride + p),
              int(count - p < lanes ? count - p : lanes));
      }
    }
    return;
  }
  for (int64_t p = 0; p < count; p += lanes) {
    const int rows = int(count - p < lanes ? count - p : lanes);
    for (int64_t c = 0; c < channels; c += lanes) {
      const int columns = int(channels - c < lanes ? channels - c : lanes);
      const A* corner = tile + c * tile_stride + p;
      Vector<A> square[lanes];
      if (columns == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = load(corner + i * tile_stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) square[i] = i < columns ? load(corner + i * tile_stride) : Vector<A>{};
      }
      transpose(square);
      T* out = target + p * position_stride + c;
      if (rows == lanes && columns == lanes) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) store(out + i * position_stride, square[i]);
      } else {
        for (int i = 0; i < rows; ++i) store(out + i * position_stride, square[i], columns);
      }
    }
  }
}

}  // namespace mf::MF_ISA
