// Depthwise convolution with its activation on CUDA. Source: mf_kernels/reference.py, depthwise_conv2d.
// Ways, tiles and legend: depthwise_tiles.cuh.
//
// Forward: x read and y written once, the activation on the sums in registers.
// Backward from g, the gradient before the activation (d_y itself where there is none, else one forward pass that writes
// d_y act'(z)): a thread makes d_x of a tile from the g around it, and the same values times x are its share of d_weight.
// So g and x are read once and d_x is written once; channels with several filters are walked again for each filter.
// d_weight and d_bias: sums of a thread, then of a block, then `finish_filters` over the blocks, always in one order.
#pragma once

#include "cuda/depthwise_tiles.cuh"

namespace mf {

// y = activation(z), or, given d_y, the gradient before the activation: y = d_y activation'(z)
template <class T, Way WAY, int V, int K, int S>
__global__ void __launch_bounds__(THREADS, 1)
    depthwise_conv2d(T* __restrict__ y,             // (B, O, OH, OW)
                     const T* __restrict__ x,       // (B, C, H, W)
                     const T* __restrict__ weight,  // (O, 1, K, K)
                     const T* __restrict__ bias,    // (O) or null
                     const T* __restrict__ d_y,     // like y, or null
                     Activation activation, DepthwiseShape s, DepthwisePlan p) {
  constexpr int LANES = WAY == Way::channels ? V : 1, P = K / 2;
  constexpr int ROWS = tile_rows(WAY, K, S, false), COLS = tile_cols(WAY, V, K, S, false);
  __shared__ float shared[K * K * WARP * LANES];
  const TileWalk walk(p, s.O);
  float filters[K * K][LANES], offset[LANES];
  load_filters(filters, weight, shared, s.O, p, walk);
  if (!walk.active) return;
  fill(offset, 0);
#pragma unroll
  for (int i = 0; i < LANES; ++i) offset[i] = bias != nullptr ? to_float(bias[walk.channel + i]) : 0.0f;
  const LaneChannels<LANES> lanes(walk.channel, s.mult);
  const Map<const T> source{x, s.C, s.H, s.W, s.channels_last};
  const Map<T> target{y, s.O, s.OH, s.OW, s.channels_last};
  for (int64_t tile = walk.first; tile < walk.end; tile += p.slots) {
    const TilePlace place(tile, p);
    const int64_t row0 = place.row * ROWS, col0 = place.col * COLS;
    float z[ROWS][COLS][LANES];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLS; ++c) {
#pragma unroll
        for (int i = 0; i < LANES; ++i) z[r][c][i] = offset[i];
      }
    }
#pragma unroll
    for (int in = 0; in < (ROWS - 1) * S + K; ++in) {
      const int64_t h = row0 * S - P + in;
      if (h < 0 || h >= s.H) continue;
      float row[(COLS - 1) * S + K][LANES];
      load_row<WAY, V, P, COLS * S>(row, source, place.b, lanes, h, col0 * S - P);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int u = in - r * S;
        if (u < 0 || u >= K) continue;
#pragma unroll
        for (int v = 0; v < K; ++v) {
#pragma unroll
          for (int c = 0; c < COLS; ++c) {
#pragma unroll
            for (int i = 0; i < LANES; ++i) z[r][c][i] += filters[u * K + v][i] * row[c * S + v][i];
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (row0 + r >= s.OH) break;
      constexpr int STORES = WAY == Way::columns ? 1 : COLS, WIDTH = WAY == Way::columns ? COLS : LANES;
#pragma unroll
      for (int c = 0; c < STORES; ++c) {
        if (col0 + c >= s.OW) break;
        const int64_t at = target.offset(place.b, walk.channel, row0 + r, col0 + c);
        float out[WIDTH], gradient[WIDTH];
        if (d_y != nullptr) load<WIDTH>(gradient, d_y + at);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const float value = WAY == Way::columns ? z[r][i][0] : z[r][c][i];
          out[i] = d_y != nullptr ? activation_gradient(gradient[i], value, activation) : activate(value, activation);
        }
        store<WIDTH>(y + at, out);
      }
    }
  }
}

// What one thread adds up
template <int K, int LANES>
struct FilterSums {
  float d_weight[K * K][LANES], d_bias[LANES];
  __device__ void clear() {
#pragma unroll
    for (int t = 0; t < K * K; ++t) fill(d_weight[t], 0);
    fill(d_bias, 0);
  }
};

template <class T, Way WAY, int V, int K, int S>
struct BackwardTile {
  static constexpr int LANES = WAY == Way::channels ? V : 1, P = K / 2;
  static constexpr int ROWS = tile_rows(WAY, K, S, true), COLS = tile_cols(WAY, V, K, S, true);
  static constexpr int BEFORE = P / S;  // rows and columns of g before the tile's own that reach it
  static constexpr int G_ROWS = (ROWS - 1 + P) / S + BEFORE + 1, G_COLS = (COLS - 1 + P) / S + BEFORE + 1;
  float d_x[ROWS][COLS][LANES], x[ROWS][COLS][LANES];

  __device__ void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLS; ++c) fill(d_x[r][c], 0);
    }
  }

  __device__ void load_x(const Map<const T>& map, int64_t b, int64_t channel, int64_t h0, int64_t w0) {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (h0 + r < map.height) {
        load_row<WAY, V, 0, COLS>(x[r], map, b, LaneChannels<LANES>(channel, 1), h0 + r, w0);
      } else {
#pragma unroll
        for (int c = 0; c < COLS; ++c) fill(x[r][c], 0);
      }
    }
  }

  // Adds what the gradients of output channel `channel` (its lanes are neighbours) give to d_x, to the sums, or to both
  template <bool TO_X, bool TO_SUMS>
  __device__ void add(FilterSums<K, LANES>& sums, const float (&filters)[K * K][LANES], const Map<const T>& g,
                      int64_t b, int64_t channel, int64_t i0, int64_t j0) {
#pragma unroll
    for (int gi = 0; gi < G_ROWS; ++gi) {
      const int64_t i = i0 - BEFORE + gi;
      if (i < 0 || i >= g.height) continue;
      float row[G_COLS][LANES];
      load_row<WAY, V, BEFORE, COLS / S>(row, g, b, LaneChannels<LANES>(channel, 1), i, j0 - BEFORE);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        const int u = r + P - S * (gi - BEFORE);  // the tap that connects output row i to the tile's row r
        if (u < 0 || u >= K) continue;
#pragma unroll
        for (int gj = 0; gj < G_COLS; ++gj) {
#pragma unroll
          for (int c = 0; c < COLS; ++c) {
            const int v = c + P - S * (gj - BEFORE);
            if (v < 0 || v >= K) continue;
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
              if (TO_X) d_x[r][c][lane] += filters[u * K + v][lane] * row[gj][lane];
              if (TO_SUMS) sums.d_weight[u * K + v][lane] += x[r][c][lane] * row[gj][lane];
              if (TO_SUMS && u == P && v == P)
                sums.d_bias[lane] += row[gj][lane];  // the middle tap meets each output once
            }
          }
        }
      }
    }
  }

  __device__ void store_d_x(const Map<T>& map, int64_t b, int64_t channel, int64_t h0, int64_t w0) const {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      if (h0 + r >= map.height) break;
      if constexpr (WAY == Way::columns) {
        float out[COLS];
#pragma unroll
        for (int c = 0; c < COLS; ++c) out[c] = d_x[r][c][0];
        store<COLS>(map.data + map.offset(b, channel, h0 + r, w0), out);
      } else {
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
          if (w0 + c < map.width) store<LANES>(map.data + map.offset(b, channel, h0 + r, w0 + c), d_x[r][c]);
        }
      }
    }
  }
};

// partials[part][o][t] = the block's sum; t = K*K is the bias
template <int K, int LANES>
__device__ inline void leave_filter_sums(float* partials, const FilterSums<K, LANES>& sums, float* shared, int64_t o,
                                         int64_t step, const DepthwiseShape& s, const DepthwisePlan& p,
                                         const TileWalk& walk) {
  constexpr int TAPS = K * K, COUNT = K == 3 ? 16 : 32;  // a power of two
  float* target = partials + (walk.part * s.O + o) * (TAPS + 1);
  if (p.across == 1) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    float values[COUNT];
#pragma unroll
    for (int t = 0; t < COUNT; ++t)
      values[t] = t < TAPS ? sums.d_weight[t < TAPS ? t : 0][0] : t == TAPS ? sums.d_bias[0] : 0.0f;
    const float total = sum_lanes_of_each(values, lane);
    __syncthreads();
    if (lane % (WARP / COUNT) == 0) shared[warp * COUNT + lane / (WARP / COUNT)] = total;
    __syncthreads();
    if (threadIdx.x <= TAPS) {
      float sum = 0;
      for (int w = 0; w < THREADS / WARP; ++w) sum += shared[w * COUNT + threadIdx.x];
      target[threadIdx.x] = sum;
    }
    return;
  }
#pragma unroll
  for (int t = 0; t <= TAPS; ++t) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < LANES; ++i)
      shared[threadIdx.x * LANES + i] = t < TAPS ? sums.d_weight[t < TAPS ? t : 0][i] : sums.d_bias[i];
    __syncthreads();
    if (int(threadIdx.x) >= p.across || !walk.active) continue;
#pragma unroll
    for (int i = 0; i < LANES; ++i) {
      float sum = 0;
      for (int slot = 0; slot < p.slots; ++slot) sum += shared[(slot * p.across + threadIdx.x) * LANES + i];
      target[i * step * (TAPS + 1) + t] = sum;
    }
  }
}

template <class T, Way WAY, int V, int K, int S>
__global__ void __launch_bounds__(THREADS, 1)
    depthwise_conv2d_backward(T* __restrict__ d_x,           // (B, C, H, W)
                              float* __restrict__ partials,  // [parts][O][K*K + 1]
                              const T* __restrict__ g,       // (B, O, OH, OW)
                              const T* __restrict__ x,       // (B, C, H, W)
                              const T* __restrict__ weight,  // (O, 1, K, K)
                              DepthwiseShape s, DepthwisePlan p) {
  using BackTile = BackwardTile<T, WAY, V, K, S>;
  constexpr int LANES = BackTile::LANES, ROWS = BackTile::ROWS, COLS = BackTile::COLS, TAPS = K * K;
  constexpr int FILTERS = TAPS * WARP * LANES, SUMS = THREADS * LANES;
  __shared__ float shared[FILTERS > SUMS ? FILTERS : SUMS];
  const TileWalk walk(p, s.C);
  const Map<const T> x_map{x, s.C, s.H, s.W, s.channels_last}, g_map{g, s.O, s.OH, s.OW, s.channels_last};
  const Map<T> d_x_map{d_x, s.C, s.H, s.W, s.channels_last};
  float filters[TAPS][LANES];
  FilterSums<K, LANES> sums;
  BackTile tile;
  const auto walk_tiles = [&](const auto& visit) {
    if (!walk.active) return;
    for (int64_t at = walk.first; at < walk.end; at += p.slots) {
      const TilePlace place(at, p);
      visit(place.b, place.row * ROWS, place.col * COLS, place.row * (ROWS / S), place.col * (COLS / S));
    }
  };
  if (s.mult == 1) {
    load_filters(filters, weight, shared, s.C, p, walk);
    sums.clear();
    walk_tiles([&](int64_t b, int64_t h, int64_t w, int64_t i, int64_t j) {
      tile.clear();
      tile.load_x(x_map, b, walk.channel, h, w);
      tile.template add<true, true>(sums, filters, g_map, b, walk.channel, i, j);
      tile.store_d_x(d_x_map, b, walk.channel, h, w);
    });
    leave_filter_sums(partials, sums, shared, walk.channel, 1, s, p, walk);
    return;
  }
  if constexpr (LANES == 1) {  // several filters a channel: one channel a thread
    walk_tiles([&](int64_t b, int64_t h, int64_t w, int64_t i, int64_t j) {
      tile.clear();
      for (int filter = 0; filter < s.mult; ++filter) {
        const int64_t o = walk.channel * s.mult + filter;
#pragma unroll
        for (int t = 0; t < TAPS; ++t) filters[t][0] = to_float(weight[o * TAPS + t]);
        tile.template add<true, false>(sums, filters, g_map, b, o, i, j);
      }
      tile.store_d_x(d_x_map, b, walk.channel, h, w);
    });
    for (int filter = 0; filter < s.mult; ++filter) {
      const int64_t o = walk.channel * s.mult + filter;
      sums.clear();
      walk_tiles([&](int64_t b, int64_t h, int64_t w, int64_t i, int64_t j) {
        tile.load_x(x_map, b, walk.channel, h, w);
        tile.template add<false, true>(sums, filters, g_map, b, o, i, j);
      });
      leave_filter_sums(partials, sums, shared, o, s.mult, s, p, walk);
    }
  }
}

// 32 values a block, 8 threads for each: every 8th part, then the 8 of them
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    finish_filters(T* __restrict__ d_weight,            // (O, 1, K, K)
                   T* __restrict__ d_bias,              // (O)
                   const float* __restrict__ partials,  // [parts][O][taps + 1]
                   int64_t count, int taps, int64_t parts) {
  constexpr int ROWS = THREADS / WARP;
  __shared__ float shared[ROWS][WARP];
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP;
  const int64_t i = int64_t(blockIdx.x) * WARP + lane;
  float total = 0;
  if (i < count) {
#pragma unroll 8
    for (int64_t part = row; part < parts; part += ROWS) total += partials[part * count + i];
  }
  shared[row][lane] = total;
  __syncthreads();
  if (row > 0 || i >= count) return;
  for (int r = 1; r < ROWS; ++r) total += shared[r][lane];
  const int64_t o = i / (taps + 1);
  const int t = int(i % (taps + 1));
  from_float(t < taps ? d_weight[o * taps + t] : d_bias[o], total);
}

// Calls f.template operator()<WAY, V, K, S>()
template <int WIDE, class F>
void with_tile(const DepthwiseShape& s, const DepthwisePlan& p, const F& f) {
  const auto with_stride = [&]<Way WAY, int V, int K>() {
    if (s.S == 1) return f.template operator()<WAY, V, K, 1>();
    return f.template operator()<WAY, V, K, 2>();
  };
  const auto with_window = [&]<Way WAY>() {
    if (s.K == 3) return with_stride.template operator()<WAY, 1, 3>();
    return with_stride.template operator()<WAY, 1, 5>();
  };
  if (p.vector > 1 && p.way == Way::columns) return with_stride.template operator()<Way::columns, WIDE, 3>();
  if (p.vector > 1) return with_stride.template operator()<Way::channels, WIDE, 3>();
  if (p.way == Way::channels) return with_window.template operator()<Way::channels>();
  return with_window.template operator()<Way::single>();
}

template <class T>
void launch_depthwise_conv2d(T* y, const T* x, const T* weight, const T* bias, const DepthwiseShape& s,
                             Activation activation, cudaStream_t stream, const T* d_y = nullptr) {
  constexpr int WIDE = 16 / sizeof(T);
  const auto p = plan_depthwise(s, {sizeof(T), aligned_16(y, x, d_y)}, WIDE, false);
  with_tile<WIDE>(s, p, [&]<Way WAY, int V, int K, int S>() {
    launch(&depthwise_conv2d<T, WAY, V, K, S>, p.blocks, stream, y, x, weight, bias, d_y, activation, s, p);
  });
}

// `gradient` is memory for B*O*OH*OW values, not used where there is no activation; `memory(floats)` gives scratch memory.
// Loads of 4 values: the filters and their sums of twice as many would not stay in registers.
template <class T, class Memory>
void launch_depthwise_conv2d_backward(T* d_x, T* d_weight, T* d_bias, const T* d_y, const T* x, const T* weight,
                                      const T* bias, T* gradient, const DepthwiseShape& s, Activation activation,
                                      const Memory& memory, cudaStream_t stream) {
  const T* g = d_y;
  if (activation != Activation::identity) {
    launch_depthwise_conv2d<T>(gradient, x, weight, bias, s, activation, stream, d_y);
    g = gradient;
  }
  const auto p = plan_depthwise(s, {sizeof(T), aligned_16(d_x, x, g)}, 4, true);
  const int taps = s.K * s.K;
  const int64_t count = s.O * (taps + 1);
  float* partials = memory(p.parts * count);
  with_tile<4>(s, p, [&]<Way WAY, int V, int K, int S>() {
    launch(&depthwise_conv2d_backward<T, WAY, V, K, S>, p.blocks, stream, d_x, partials, g, x, weight, s, p);
  });
  launch(&finish_filters<T>, divide_up(count, WARP), stream, d_weight, d_bias, partials, count, taps, p.parts);
}

}  // namespace mf
