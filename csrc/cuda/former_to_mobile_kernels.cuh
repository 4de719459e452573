// Former -> Mobile on CUDA: every position attends over M tokens; the residual is included.
// Source: mf_kernels/reference.py, former_to_mobile. Ways through the map and legend: attention.cuh.
//
// Forward: x read once, y written once, the softmax over at most 8 scores in registers, nothing saved.
// Backward, from x and d_y: softmax again, d_score = p (d_p - sum p d_p), d_x = d_y + d_score k; d_k and d_v are summed in
// registers, then over a block or a warp, then by a second kernel over those.
#pragma once

#include "cuda/attention.cuh"

namespace mf {

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1) former_to_mobile_channels(T* __restrict__ y,        // (B, L, C)
                                                                        const T* __restrict__ x,  // (B, L, C)
                                                                        const T* __restrict__ k,  // (B, M, C)
                                                                        const T* __restrict__ v,  // (B, M, C)
                                                                        AttentionShape s, AttentionPlan p) {
  constexpr int UNROLL = 4;
  const ChannelLane lane(s, p);
  float keys[M][V], values[M][V];
  load_token_rows(keys, k, s, lane, s.scale * float(LOG2_E));
  load_token_rows(values, v, s, lane, 1);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base; base < lane.end; base += UNROLL * p.slots) {  // the same steps for all lanes of a warp
    Pack<T, V> loaded[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots + lane.slot;
      loaded[u] = Pack<T, V>{};
      if (lane.active && position < lane.end) loaded[u] = load_pack<V>(x + start + position * s.C);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots + lane.slot;
      float out[V], scores[M];
      widen(out, loaded[u]);
      dot_rows(scores, keys, out);
      sum_lanes(scores, p.across);
      softmax_over_tokens(scores, s.M);
      add_rows(out, scores, values);
      if (lane.active && position < lane.end) store<V>(y + start + position * s.C, out);
    }
  }
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    former_to_mobile_channels_backward(T* __restrict__ d_x,            // (B, L, C)
                                       float* __restrict__ d_k_parts,  // [B][parts][M][C]
                                       float* __restrict__ d_v_parts,  // [B][parts][M][C]
                                       const T* __restrict__ d_y,      // (B, L, C)
                                       const T* __restrict__ x,        // (B, L, C)
                                       const T* __restrict__ k,        // (B, M, C)
                                       const T* __restrict__ v,        // (B, M, C)
                                       AttentionShape s, AttentionPlan p) {
  constexpr int UNROLL = 2;
  __shared__ float shared[THREADS * V];
  const ChannelLane lane(s, p);
  float keys[M][V], values[M][V], d_keys[M][V], d_values[M][V];
  load_token_rows(keys, k, s, lane, s.scale * float(LOG2_E));
  load_token_rows(values, v, s, lane, 1);
#pragma unroll
  for (int m = 0; m < M; ++m) fill(d_keys[m], 0), fill(d_values[m], 0);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base; base < lane.end; base += UNROLL * p.slots) {
    Pack<T, V> loaded[UNROLL], loaded_d[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots + lane.slot, at = start + position * s.C;
      loaded[u] = Pack<T, V>{}, loaded_d[u] = Pack<T, V>{};
      if (lane.active && position < lane.end) loaded[u] = load_pack<V>(x + at), loaded_d[u] = load_pack<V>(d_y + at);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots + lane.slot;
      float here[V], gradient[V], scores[M], d_scores[M], mean = 0;
      widen(here, loaded[u]), widen(gradient, loaded_d[u]);
      dot_rows(scores, keys, here), dot_rows(d_scores, values, gradient);
      sum_lanes(scores, p.across), sum_lanes(d_scores, p.across);
      softmax_over_tokens(scores, s.M);
#pragma unroll
      for (int m = 0; m < M; ++m) mean += scores[m] * d_scores[m];
#pragma unroll
      for (int m = 0; m < M; ++m) d_scores[m] = scores[m] * (d_scores[m] - mean);
      // Beyond the end both are zero and add nothing
      add_outer(d_keys, d_scores, here), add_outer(d_values, scores, gradient);
#pragma unroll
      for (int m = 0; m < M; ++m) d_scores[m] *= float(LN_2);  // the keys carry log2(e)
      add_rows(gradient, d_scores, keys);
      if (lane.active && position < lane.end) store<V>(d_x + start + position * s.C, gradient);
    }
  }
  leave_sums(d_k_parts, d_keys, shared, s, p, lane);
  leave_sums(d_v_parts, d_values, shared, s, p, lane);
}

// scores[.][i] of position i in, softmax out
template <int M, int V>
__device__ inline void softmax_of_positions(float (&scores)[M][V], int count) {
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float column[M];
#pragma unroll
    for (int m = 0; m < M; ++m) column[m] = scores[m][i];
    softmax_over_tokens(column, count);
#pragma unroll
    for (int m = 0; m < M; ++m) scores[m][i] = column[m];
  }
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1) former_to_mobile_positions(T* __restrict__ y,  // (B, C, L) in any strides
                                                                         const T* __restrict__ x,  // like y
                                                                         const T* __restrict__ k,  // (B, M, C)
                                                                         const T* __restrict__ v,  // (B, M, C)
                                                                         AttentionShape s, AttentionPlan p) {
  __shared__ TokenColumn<M> columns[CHUNK];
  __shared__ float shared[THREADS * V];
  const PositionLane lane(s, p);
  float weights[M][V];
#pragma unroll
  for (int m = 0; m < M; ++m) fill(weights[m], 0);
  for_channels<4>(
      s, lane,
      [&](int64_t first, int count) {
        stage_tokens<T, M>(columns, k, s, lane.b, first, count, s.scale * float(LOG2_E));
      },
      [&](int e, int64_t at, int) {
        const TokenColumn<M> key = columns[e];
        float here[V];
        load_if(here, x + at, lane.active);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < V; ++i) weights[m][i] += key.of[m] * here[i];
        }
      });
  sum_slices(weights, shared, lane, p);
  softmax_of_positions(weights, s.M);
  for_channels<2>(
      s, lane, [&](int64_t first, int count) { stage_tokens<T, M>(columns, v, s, lane.b, first, count, 1); },
      [&](int e, int64_t at, int) {
        if (!lane.active) return;
        const TokenColumn<M> value = columns[e];
        float out[V];
        load<V>(out, x + at);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < V; ++i) out[i] += weights[m][i] * value.of[m];
        }
        store<V>(y + at, out);
      });
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    former_to_mobile_positions_backward(T* __restrict__ d_x,            // (B, C, L) in any strides
                                        float* __restrict__ d_k_parts,  // [B][parts][M][C]
                                        float* __restrict__ d_v_parts,  // [B][parts][M][C]
                                        const T* __restrict__ d_y,      // like d_x
                                        const T* __restrict__ x,        // like d_x
                                        const T* __restrict__ k,        // (B, M, C)
                                        const T* __restrict__ v,        // (B, M, C)
                                        AttentionShape s, AttentionPlan p) {
  __shared__ TokenColumn<M> key_columns[CHUNK], value_columns[CHUNK];
  __shared__ float shared[THREADS * V];
  const PositionLane lane(s, p);
  const auto stage = [&](int64_t first, int count) {
    stage_tokens<T, M>(key_columns, k, s, lane.b, first, count, s.scale * float(LOG2_E));
    stage_tokens<T, M>(value_columns, v, s, lane.b, first, count, 1);
  };
  float weights[M][V], d_scores[M][V];
#pragma unroll
  for (int m = 0; m < M; ++m) fill(weights[m], 0), fill(d_scores[m], 0);
  for_channels<4>(s, lane, stage, [&](int e, int64_t at, int) {
    const TokenColumn<M> key = key_columns[e], value = value_columns[e];
    float here[V], gradient[V];
    load_if(here, x + at, lane.active), load_if(gradient, d_y + at, lane.active);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) weights[m][i] += key.of[m] * here[i], d_scores[m][i] += value.of[m] * gradient[i];
    }
  });
  sum_slices(weights, shared, lane, p), sum_slices(d_scores, shared, lane, p);
  softmax_of_positions(weights, s.M);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    float mean = 0;
#pragma unroll
    for (int m = 0; m < M; ++m) mean += weights[m][i] * d_scores[m][i];
#pragma unroll
    for (int m = 0; m < M; ++m) d_scores[m][i] = weights[m][i] * (d_scores[m][i] - mean);
  }
  for_channels<2>(s, lane, stage, [&](int e, int64_t at, int in_head) {
    const TokenColumn<M> key = key_columns[e];
    constexpr int PADDED = TokenColumn<M>::PADDED;
    float here[V], gradient[V], d_key[PADDED], d_value[PADDED];
    load_if(here, x + at, lane.active), load_if(gradient, d_y + at, lane.active);
    fill(d_key, 0), fill(d_value, 0);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) d_key[m] += d_scores[m][i] * here[i], d_value[m] += weights[m][i] * gradient[i];
    }
    leave_lane_sums(d_k_parts, d_key, s, p, lane, lane.channel + in_head);
    leave_lane_sums(d_v_parts, d_value, s, p, lane, lane.channel + in_head);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      const float factor = key.of[m] * float(LN_2);  // the keys carry log2(e)
#pragma unroll
      for (int i = 0; i < V; ++i) gradient[i] += d_scores[m][i] * factor;
    }
    if (lane.active) store<V>(d_x + at, gradient);
  });
}

template <class T>
void launch_former_to_mobile(T* y, const T* x, const T* k, const T* v, const AttentionShape& s, cudaStream_t stream) {
  constexpr int WIDE = 16 / sizeof(T);
  const auto p = plan_attention(s, {sizeof(T), aligned_16(y, x)}, WIDE);
  with_width<WIDE>(p, [&]<int V, int M>() {
    if constexpr (V > 1) {
      if (p.channel_lanes) return launch(&former_to_mobile_channels<T, V, M>, p.blocks, stream, y, x, k, v, s, p);
    }
    launch(&former_to_mobile_positions<T, V, M>, p.blocks, stream, y, x, k, v, s, p);
  });
}

// `memory(floats)` gives scratch memory. Loads of 4 values: the sums of twice as many would not stay in registers.
template <class T, class Memory>
void launch_former_to_mobile_backward(T* d_x, T* d_k, T* d_v, const T* d_y, const T* x, const T* k, const T* v,
                                      const AttentionShape& s, const Memory& memory, cudaStream_t stream) {
  const auto p = plan_attention(s, {sizeof(T), aligned_16(d_x, d_y, x)}, 4);
  const int64_t rows = s.M * s.C;
  float *d_k_parts = memory(s.B * p.parts * rows), *d_v_parts = memory(s.B * p.parts * rows);
  with_width<4>(p, [&]<int V, int M>() {
    if constexpr (V > 1) {
      if (p.channel_lanes) {
        return launch(&former_to_mobile_channels_backward<T, V, M>, p.blocks, stream, d_x, d_k_parts, d_v_parts, d_y, x,
                      k, v, s, p);
      }
    }
    launch(&former_to_mobile_positions_backward<T, V, M>, p.blocks, stream, d_x, d_k_parts, d_v_parts, d_y, x, k, v, s,
           p);
  });
  launch_sum_parts(d_k, d_k_parts, s.B, rows, p.parts, s.scale, stream);
  launch_sum_parts(d_v, d_v_parts, s.B, rows, p.parts, 1.0f, stream);
}

}  // namespace mf
