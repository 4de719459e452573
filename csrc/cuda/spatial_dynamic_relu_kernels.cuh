// Spatial dynamic ReLU on CUDA: y = max(a1 x, a2 x), the slopes of a position mixed from those of the tokens.
// Source: mf_kernels/reference.py, spatial_dynamic_relu. Ways through the map and legend: attention.cuh, whose heads are
// here N chunks that share out the channels, so that a group holds one and blocks are enough.
//
// Forward: x read once, y written once, the slopes of a position in registers. Backward: those again; what a1 and a2 of a
// position get goes to d_theta by sums over positions, in registers, then over a block or a warp, then by a second kernel
// over those, and to d_alpha by sums over channels, over a group or slices, then by a second kernel over the chunks.
#pragma once

#include "cuda/attention.cuh"
#include "cuda/dynamic_relu_kernels.cuh"

namespace mf {

struct SpatialPlan {
  AttentionShape s;
  AttentionPlan p;
};

inline SpatialPlan plan_spatial_dynamic_relu(int64_t B, int64_t C, int64_t L, int64_t M, Access access,
                                             bool channels_last) {
  const int V = int(smaller(4, access.values(channels_last ? C : L, true)));
  int64_t N = 1;
  if (channels_last && V > 1) {
    while (C / V % N != 0 || C / V / N > WARP) ++N;
    AttentionPlan p{};
    p.channel_lanes = true, p.vector = V, p.tokens = M <= 4 ? 4 : M <= 6 ? 6 : 8;
    p.across = 1;
    while (p.across < C / V / N) p.across *= 2;
    p.slots = THREADS / p.across;
    const int64_t steps = divide_up(L, p.slots);
    p.per_part = divide_up(steps, parts_of(steps, B * N, 8)) * p.slots;
    p.parts = divide_up(L, p.per_part);
    p.blocks = B * N * p.parts;
    return {attention_shape(B, C, L, M, N, true), p};
  }
  const int64_t tiles = divide_up(divide_up(L, V), WARP);  // where a block holds the fewest positions
  for (int64_t next = 2; C / next >= THREADS / WARP && B * N * tiles < BLOCKS_NEEDED; ++next)
    N = C % next == 0 ? next : N;
  const AttentionShape s = attention_shape(B, C, L, M, N, channels_last);
  return {s, plan_attention(s, access, 4)};
}

// Channel lanes: where a thread stands. A block has one chunk of the channels
struct SpatialLane {
  int64_t b, part, chunk, first, channel, base, end;  // first channel of the chunk and of this thread's V
  int at, slot;
  bool active;
  __device__ SpatialLane(const AttentionShape& s, const AttentionPlan& p) {
    const int64_t sample_chunk = blockIdx.x / p.parts;
    part = blockIdx.x % p.parts, chunk = sample_chunk % s.N, b = sample_chunk / s.N;
    at = threadIdx.x % p.across * p.vector, slot = threadIdx.x / p.across;
    active = at < s.E;
    first = chunk * s.E, channel = first + at;
    base = part * p.per_part, end = smaller(s.L, base + p.per_part);
  }
};

// rows[m] = slopes of V channels of each token; zeros beyond M and for threads without channels
template <class T, int M, int V>
__device__ inline void load_slope_rows(float (&rows1)[M][V], float (&rows2)[M][V], const T* theta,
                                       const AttentionShape& s, const SpatialLane& lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const bool there = lane.active && m < s.M;
      rows1[m][i] = there ? slope1_of(theta, lane.b * s.M + m, lane.channel + i, s.C) : 0.0f;
      rows2[m][i] = there ? slope2_of(theta, lane.b * s.M + m, lane.channel + i, s.C) : 0.0f;
    }
  }
}

// The weights of the tokens at one position; zeros beyond M, and beyond the end
template <class T, int M>
__device__ inline void load_weights(float (&weights)[M], const T* alpha, const AttentionShape& s, int64_t b,
                                    int64_t position, bool inside) {
#pragma unroll
  for (int m = 0; m < M; ++m) weights[m] = inside && m < s.M ? to_float(alpha[(b * s.M + m) * s.L + position]) : 0.0f;
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1) spatial_dynamic_relu_channels(T* __restrict__ y,            // (B, L, C)
                                                                            const T* __restrict__ x,      // (B, L, C)
                                                                            const T* __restrict__ theta,  // (B, M, 2C)
                                                                            const T* __restrict__ alpha,  // (B, M, L)
                                                                            AttentionShape s, AttentionPlan p) {
  constexpr int UNROLL = 2;
  const SpatialLane lane(s, p);
  if (!lane.active) return;
  float rows1[M][V], rows2[M][V];
  load_slope_rows(rows1, rows2, theta, s, lane);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base + lane.slot; base < lane.end; base += UNROLL * p.slots) {
    Pack<T, V> loaded[UNROLL];
    float weights[UNROLL][M];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots;
      loaded[u] = Pack<T, V>{};
      if (position < lane.end) loaded[u] = load_pack<V>(x + start + position * s.C);
      load_weights(weights[u], alpha, s, lane.b, position, position < lane.end);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots;
      float value[V], slope1[V], slope2[V];
      widen(value, loaded[u]);
      fill(slope1, 0), fill(slope2, 0);
      add_rows(slope1, weights[u], rows1), add_rows(slope2, weights[u], rows2);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = larger_or_nan(slope1[i] * value[i], slope2[i] * value[i]);
      if (position < lane.end) store<V>(y + start + position * s.C, value);
    }
  }
}

// Channel lanes: partials[b][part][m][c] = sum over the block's slots, always in the same order; 2C channels of theta
template <int M, int V>
__device__ inline void leave_slope_sums(float* partials, const float (&sums)[M][V], float* shared,  // [THREADS * V]
                                        int64_t offset, const AttentionShape& s, const AttentionPlan& p,
                                        const SpatialLane& lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m >= s.M) break;
#pragma unroll
    for (int i = 0; i < V; ++i) shared[threadIdx.x * V + i] = sums[m][i];
    __syncthreads();
    for (int c = threadIdx.x; c < s.E; c += THREADS) {
      float total = 0;
      for (int slot = 0; slot < p.slots; ++slot) total += shared[slot * p.across * V + c];
      partials[((lane.b * p.parts + lane.part) * s.M + m) * 2 * s.C + offset + lane.first + c] = total;
    }
    __syncthreads();
  }
}

// d_alpha of one chunk: the result where it is the only one, else a part of the sum over chunks
template <class T>
__device__ inline void leave_weight(T* d_alpha, float* parts, float value, const AttentionShape& s, int64_t b,
                                    int64_t chunk, int m, int64_t position) {
  if (s.N == 1) {
    from_float(d_alpha[(b * s.M + m) * s.L + position], value);
  } else {
    parts[((b * s.N + chunk) * s.M + m) * s.L + position] = value;
  }
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    spatial_dynamic_relu_channels_backward(T* __restrict__ d_x,                // (B, L, C)
                                           float* __restrict__ d_theta_parts,  // [B][parts][M][2C]
                                           T* __restrict__ d_alpha,            // (B, M, L)
                                           float* __restrict__ d_alpha_parts,  // [B][N][M][L]
                                           const T* __restrict__ d_y,          // (B, L, C)
                                           const T* __restrict__ x,            // (B, L, C)
                                           const T* __restrict__ theta,        // (B, M, 2C)
                                           const T* __restrict__ alpha,        // (B, M, L)
                                           AttentionShape s, AttentionPlan p) {
  __shared__ float shared[THREADS * V];
  const SpatialLane lane(s, p);
  float rows1[M][V], rows2[M][V], d_rows1[M][V], d_rows2[M][V];
  load_slope_rows(rows1, rows2, theta, s, lane);
#pragma unroll
  for (int m = 0; m < M; ++m) fill(d_rows1[m], 0), fill(d_rows2[m], 0);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base; base < lane.end; base += p.slots) {  // the same steps for all lanes of a warp
    const int64_t position = base + lane.slot, here = start + position * s.C;
    const bool inside = position < lane.end, mine = inside && lane.active;
    Pack<T, V> loaded{}, loaded_d{};
    if (mine) loaded = load_pack<V>(x + here), loaded_d = load_pack<V>(d_y + here);
    float weights[M], d_weights[M], value[V], gradient[V], slope1[V], slope2[V], d_slope1[V], d_slope2[V];
    load_weights(weights, alpha, s, lane.b, position, inside);
    widen(value, loaded), widen(gradient, loaded_d);
    fill(slope1, 0), fill(slope2, 0), fill(d_slope1, 0), fill(d_slope2, 0);
    add_rows(slope1, weights, rows1), add_rows(slope2, weights, rows2);
#pragma unroll
    for (int i = 0; i < V; ++i)
      gradient[i] = dynamic_relu_gradient(value[i], gradient[i], slope1[i], slope2[i], d_slope1[i], d_slope2[i]);
    if (mine) store<V>(d_x + here, gradient);
    // Beyond the end and without channels all of them are zero and add nothing
    add_outer(d_rows1, weights, d_slope1), add_outer(d_rows2, weights, d_slope2);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      d_weights[m] = 0;
#pragma unroll
      for (int i = 0; i < V; ++i) d_weights[m] += rows1[m][i] * d_slope1[i] + rows2[m][i] * d_slope2[i];
    }
    sum_lanes(d_weights, p.across);
    if (inside && lane.at == 0) {
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (m < s.M) leave_weight(d_alpha, d_alpha_parts, d_weights[m], s, lane.b, lane.chunk, m, position);
    }
  }
  leave_slope_sums(d_theta_parts, d_rows1, shared, 0, s, p, lane);
  leave_slope_sums(d_theta_parts, d_rows2, shared, s.C, s, p, lane);
}

// columns[e].of[m] = slopes of a channel of each token, for `count` channels; the caller synchronises before and after
template <class T, int M>
__device__ inline void stage_slopes(TokenColumn<M>* columns1, TokenColumn<M>* columns2, const T* theta,
                                    const AttentionShape& s, int64_t b, int64_t first, int count) {
  for (int i = threadIdx.x; i < count * M; i += THREADS) {
    const int m = i / count, e = i % count;
    columns1[e].of[m] = m < s.M ? slope1_of(theta, b * s.M + m, first + e, s.C) : 0.0f;
    columns2[e].of[m] = m < s.M ? slope2_of(theta, b * s.M + m, first + e, s.C) : 0.0f;
  }
}

// weights[m] of the V positions of this thread
template <class T, int M, int V>
__device__ inline void load_weights_of_positions(float (&weights)[M][V], const T* alpha, const AttentionShape& s,
                                                 const PositionLane& lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) {  // once a block: alpha may lie at any address
      const bool there = lane.active && m < s.M;
      weights[m][i] = there ? to_float(alpha[(lane.b * s.M + m) * s.L + lane.position + i]) : 0.0f;
    }
  }
}

template <int M, int V>
__device__ inline void mix_column(float (&slope)[V], const TokenColumn<M>& column, const float (&weights)[M][V]) {
  fill(slope, 0);
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) slope[i] += column.of[m] * weights[m][i];
  }
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    spatial_dynamic_relu_positions(T* __restrict__ y,            // (B, C, L) in any strides
                                   const T* __restrict__ x,      // like y
                                   const T* __restrict__ theta,  // (B, M, 2C)
                                   const T* __restrict__ alpha,  // (B, M, L)
                                   AttentionShape s, AttentionPlan p) {
  __shared__ TokenColumn<M> columns1[CHUNK], columns2[CHUNK];
  const PositionLane lane(s, p);
  float weights[M][V];
  load_weights_of_positions(weights, alpha, s, lane);
  for_channels<2>(
      s, lane,
      [&](int64_t first, int count) { stage_slopes<T, M>(columns1, columns2, theta, s, lane.b, first, count); },
      [&](int e, int64_t at, int) {
        if (!lane.active) return;
        float value[V], slope1[V], slope2[V];
        load<V>(value, x + at);
        mix_column(slope1, columns1[e], weights), mix_column(slope2, columns2[e], weights);
#pragma unroll
        for (int i = 0; i < V; ++i) value[i] = larger_or_nan(slope1[i] * value[i], slope2[i] * value[i]);
        store<V>(y + at, value);
      });
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    spatial_dynamic_relu_positions_backward(T* __restrict__ d_x,                // (B, C, L) in any strides
                                            float* __restrict__ d_theta_parts,  // [B][parts][M][2C]
                                            T* __restrict__ d_alpha,            // (B, M, L)
                                            float* __restrict__ d_alpha_parts,  // [B][N][M][L]
                                            const T* __restrict__ d_y,          // like d_x
                                            const T* __restrict__ x,            // like d_x
                                            const T* __restrict__ theta,        // (B, M, 2C)
                                            const T* __restrict__ alpha,        // (B, M, L)
                                            AttentionShape s, AttentionPlan p) {
  __shared__ TokenColumn<M> columns1[CHUNK], columns2[CHUNK];
  __shared__ float shared[THREADS * V];
  const PositionLane lane(s, p);
  AttentionShape of_theta = s;  // whose rows are of 2C channels
  of_theta.C *= 2;
  float weights[M][V], d_weights[M][V];
  load_weights_of_positions(weights, alpha, s, lane);
#pragma unroll
  for (int m = 0; m < M; ++m) fill(d_weights[m], 0);
  for_channels<1>(
      s, lane,
      [&](int64_t first, int count) { stage_slopes<T, M>(columns1, columns2, theta, s, lane.b, first, count); },
      [&](int e, int64_t at, int in_chunk) {
        const TokenColumn<M> column1 = columns1[e], column2 = columns2[e];
        constexpr int PADDED = TokenColumn<M>::PADDED;
        float value[V], gradient[V], slope1[V], slope2[V], d_slope1[V], d_slope2[V], d_1[PADDED], d_2[PADDED];
        load_if(value, x + at, lane.active), load_if(gradient, d_y + at, lane.active);
        mix_column(slope1, column1, weights), mix_column(slope2, column2, weights);
        fill(d_slope1, 0), fill(d_slope2, 0), fill(d_1, 0), fill(d_2, 0);
#pragma unroll
        for (int i = 0; i < V; ++i)
          gradient[i] = dynamic_relu_gradient(value[i], gradient[i], slope1[i], slope2[i], d_slope1[i], d_slope2[i]);
        if (lane.active) store<V>(d_x + at, gradient);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < V; ++i) {
            d_1[m] += weights[m][i] * d_slope1[i], d_2[m] += weights[m][i] * d_slope2[i];
            d_weights[m][i] += column1.of[m] * d_slope1[i] + column2.of[m] * d_slope2[i];
          }
        }
        leave_lane_sums(d_theta_parts, d_1, of_theta, p, lane, lane.channel + in_chunk);
        leave_lane_sums(d_theta_parts, d_2, of_theta, p, lane, s.C + lane.channel + in_chunk);
      });
  sum_slices(d_weights, shared, lane, p);
  if (!lane.active || lane.slice != 0) return;
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (m < s.M) leave_weight(d_alpha, d_alpha_parts, d_weights[m][i], s, lane.b, lane.head, m, lane.position + i);
  }
}

template <class T>
void launch_spatial_dynamic_relu(T* y, const T* x, const T* theta, const T* alpha, int64_t B, int64_t C, int64_t L,
                                 int64_t M, bool channels_last, cudaStream_t stream) {
  const auto [s, p] = plan_spatial_dynamic_relu(B, C, L, M, {sizeof(T), aligned_16(y, x)}, channels_last);
  const auto run = [&, &s = s, &p = p]<int V, int TOKENS>() {
    if constexpr (V > 1) {
      if (p.channel_lanes)
        return launch(&spatial_dynamic_relu_channels<T, V, TOKENS>, p.blocks, stream, y, x, theta, alpha, s, p);
    }
    launch(&spatial_dynamic_relu_positions<T, V, TOKENS>, p.blocks, stream, y, x, theta, alpha, s, p);
  };
  with_width<4>(p, run);
}

// `memory(floats)` gives scratch memory
template <class T, class Memory>
void launch_spatial_dynamic_relu_backward(T* d_x, T* d_theta, T* d_alpha, const T* d_y, const T* x, const T* theta,
                                          const T* alpha, int64_t B, int64_t C, int64_t L, int64_t M,
                                          bool channels_last, const Memory& memory, cudaStream_t stream) {
  const auto [s, p] = plan_spatial_dynamic_relu(B, C, L, M, {sizeof(T), aligned_16(d_x, d_y, x)}, channels_last);
  const int64_t row = M * 2 * C;
  float* d_theta_parts = memory(B * p.parts * row);
  float* d_alpha_parts = s.N > 1 ? memory(B * s.N * M * L) : nullptr;
  const auto run = [&, &s = s, &p = p]<int V, int TOKENS>() {
    if constexpr (V > 1) {
      if (p.channel_lanes) {
        return launch(&spatial_dynamic_relu_channels_backward<T, V, TOKENS>, p.blocks, stream, d_x, d_theta_parts,
                      d_alpha, d_alpha_parts, d_y, x, theta, alpha, s, p);
      }
    }
    launch(&spatial_dynamic_relu_positions_backward<T, V, TOKENS>, p.blocks, stream, d_x, d_theta_parts, d_alpha,
           d_alpha_parts, d_y, x, theta, alpha, s, p);
  };
  with_width<4>(p, run);
  launch(&finish_slopes<T>, divide_up(B * row, THREADS), stream, d_theta, d_theta_parts, theta, B * row, row, p.parts);
  if (s.N > 1) launch_sum_parts(d_alpha, d_alpha_parts, B, M * L, s.N, 1.0f, stream);
}

}  // namespace mf
