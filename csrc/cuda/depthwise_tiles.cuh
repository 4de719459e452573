// How depthwise convolutions are cut into tiles, and how a row of one is loaded.
//
// Legend: B batch, C input and O = C*mult output channels, H W input and OH OW output sides, K kernel side, S stride,
// P = K/2 padding, T stored type, V values a load.
// A thread makes ROWS x COLS neighbouring positions of LANES channels. Neighbouring tiles read their common border twice;
// the second read comes from the first-level cache. Ways:
//   channels   channels_last: a load holds V channels of one position, neighbouring threads hold neighbouring channels
//   columns    contiguous, sides that fill whole loads: a load holds V columns of one channel
//   single     contiguous, any sides: one value a load
// A block keeps its channels and walks tiles of all samples, so that filters are read and their gradients summed once.
#pragma once

#include "cuda/device.cuh"

namespace mf {

struct DepthwiseShape {
  int64_t B, C, O, H, W, OH, OW;
  int mult, K, S;
  bool channels_last;
};

inline DepthwiseShape depthwise_shape(int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t K, int64_t S,
                                      bool channels_last) {
  return {B, C, O, H, W, (H - 1) / S + 1, (W - 1) / S + 1, int(O / C), int(K), int(S), channels_last};
}

enum class Way { channels, columns, single };

// The larger a tile, the fewer loads a value, until the sums of its taps no longer stay in registers. Backward a tile is
// made of input positions and covers whole strides.
MF_HOST_DEVICE constexpr int tile_rows(Way way, int K, int S, bool backward) {
  if (backward && S == 2) return 2;
  if (K == 5) return backward ? 1 : 2;
  if (way == Way::single) return 4;
  return backward || S == 1 ? 2 : 1;
}
MF_HOST_DEVICE constexpr int tile_cols(Way way, int V, int K, int S, bool backward) {
  if (way == Way::columns) return V;
  if (backward && S == 2) return 2;
  return way == Way::channels && !(backward && K == 5) ? 2 : 1;
}

struct DepthwisePlan {
  Way way;
  int vector;
  int across, slots;  // threads along channels, and along tiles
  int64_t channel_blocks, tile_rows, tile_cols, tiles, parts, per_part, blocks;
};

// `channels`, `height` and `width` of what a tile is made of: the output forward, the input backward
inline DepthwisePlan plan_depthwise(const DepthwiseShape& s, Access access, int widest, bool backward) {
  DepthwisePlan p{};
  const int64_t channels = backward ? s.C : s.O, height = backward ? s.H : s.OH, width = backward ? s.W : s.OW;
  widest = s.K == 3 ? widest : 1;  // 25 taps of several channels do not stay in registers
  const bool fits = access.aligned && widest > 1;
  p.way = s.channels_last                                   ? Way::channels
          : fits && s.W % widest == 0 && s.OW % widest == 0 ? Way::columns
                                                            : Way::single;
  p.vector = p.way == Way::columns || (s.channels_last && fits && channels % widest == 0 && !(backward && s.mult > 1))
                 ? widest
                 : 1;
  p.tile_rows = divide_up(height, tile_rows(p.way, s.K, s.S, backward));
  p.tile_cols = divide_up(width, tile_cols(p.way, p.vector, s.K, s.S, backward));
  p.tiles = s.B * p.tile_rows * p.tile_cols;
  const int64_t columns = s.channels_last ? channels / p.vector : channels;
  p.channel_blocks = s.channels_last ? divide_up(columns, WARP) : columns;
  p.across = s.channels_last ? int(divide_up(columns, p.channel_blocks)) : 1;
  p.slots = THREADS / p.across;
  // Backward leaves a partial sum for each part, so it takes a quarter of the blocks
  const int64_t steps = divide_up(p.tiles, p.slots);
  p.per_part = divide_up(steps, parts_of(steps, p.channel_blocks * (backward ? 4 : 1), 2)) * p.slots;
  p.parts = divide_up(p.tiles, larger(p.per_part, 1));
  p.blocks = p.channel_blocks * p.parts;
  return p;
}

// Where a thread stands: its first channel, and the tiles that it walks
struct TileWalk {
  int64_t channel, part, first, end;
  bool active;
  __device__ TileWalk(const DepthwisePlan& p, int64_t channels) {
    const int64_t channel_block = blockIdx.x % p.channel_blocks;
    part = blockIdx.x / p.channel_blocks;
    channel = (channel_block * p.across + threadIdx.x % p.across) * (p.way == Way::channels ? p.vector : 1);
    const int slot = threadIdx.x / p.across;
    active = slot < p.slots && channel < channels;
    first = part * p.per_part + slot, end = smaller(p.tiles, (part + 1) * p.per_part);
  }
};

struct TilePlace {
  int64_t b, row, col;  // sample, tile row, tile column
  __device__ TilePlace(int64_t tile, const DepthwisePlan& p) {
    const int64_t line = divide(tile, p.tile_cols);
    col = tile - line * p.tile_cols, b = divide(line, p.tile_rows), row = line - b * p.tile_rows;
  }
};

// A map (B, channels, height, width) in either layout
template <class T>
struct Map {
  T* data;
  int64_t channels, height, width;
  bool channels_last;
  __device__ int64_t offset(int64_t b, int64_t c, int64_t h, int64_t w) const {
    return channels_last ? ((b * height + h) * width + w) * channels + c
                         : ((b * channels + c) * height + h) * width + w;
  }
};

// The channels of a map that a thread's lanes read: neighbours, or, where several outputs share an input, any
template <int LANES>
struct LaneChannels {
  int64_t first;
  int beyond[LANES];  // channel of a lane less `first`
  bool neighbours;
  __device__ LaneChannels(int64_t channel, int folds) : first(channel / folds), neighbours(folds == 1) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) beyond[i] = neighbours ? i : int((channel + i) / folds - first);
  }
};

// row[j] = columns first + j of row h; zeros outside the map. Where WAY is columns, MIDDLE columns from first + LEFT on
// are there, and aligned.
template <Way WAY, int V, int LEFT, int MIDDLE, class T, int LANES, int N>
__device__ inline void load_row(float (&row)[N][LANES], const Map<const T>& map, int64_t b,
                                const LaneChannels<LANES>& lanes, int64_t h, int64_t first) {
  const T* line = map.data + map.offset(b, lanes.first, h, 0);
  if constexpr (WAY == Way::columns) {
    constexpr int PACK = MIDDLE < V ? MIDDLE : V;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (j >= LEFT && j < LEFT + MIDDLE) continue;
      const int64_t w = first + j;
      row[j][0] = w >= 0 && w < map.width ? to_float(line[w]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < MIDDLE; j += PACK) {
      float pack[PACK];
      load<PACK>(pack, line + first + LEFT + j);
#pragma unroll
      for (int i = 0; i < PACK; ++i) row[LEFT + j + i][0] = pack[i];
    }
  } else {
    const int64_t step = map.channels_last ? map.channels : 1;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int64_t w = first + j;
      if (w < 0 || w >= map.width) {
        fill(row[j], 0);
      } else if (LANES == 1 || lanes.neighbours) {
        load<LANES>(row[j], line + w * step);
      } else {
#pragma unroll
        for (int i = 0; i < LANES; ++i) row[j][i] = to_float(line[w * step + lanes.beyond[i]]);
      }
    }
  }
}

// weight[t] of this thread's channels: staged, since a channel's taps are neighbours in memory and not its lanes'
template <int TAPS, int LANES, class T>
__device__ inline void load_filters(float (&filters)[TAPS][LANES], const T* weight,  // (channels, 1, K, K)
                                    float* shared,                                   // [TAPS * WARP * LANES]
                                    int64_t channels, const DepthwisePlan& p, const TileWalk& walk) {
  const int width = p.across * LANES;
  const int64_t first = walk.channel - threadIdx.x % p.across * LANES;
  for (int i = threadIdx.x; i < width * TAPS; i += THREADS) {
    const int c = i / TAPS, t = i % TAPS;
    shared[t * width + c] = first + c < channels ? to_float(weight[(first + c) * TAPS + t]) : 0.0f;
  }
  __syncthreads();
#pragma unroll
  for (int t = 0; t < TAPS; ++t) {
#pragma unroll
    for (int i = 0; i < LANES; ++i) filters[t][i] = shared[t * width + threadIdx.x % p.across * LANES + i];
  }
}

}  // namespace mf
