// Mobile -> Former on CUDA: M tokens attend over L positions; keys and values are the map itself.
// Source: mf_kernels/reference.py, mobile_to_former. Ways through the map and legend: attention.cuh.
//
// Forward: x read once. A group of lanes (or a warp) runs the online softmax over its own positions; a block merges its
// groups into a part (maximum, sum, weighted sum of positions), `merge_parts` merges the parts of a sample.
// Backward, from x and the log-sum-exp: p again, d_score = p (d_out . x - delta) with delta = d_out . out,
// d_x = d_score q + p d_out in one write, d_q = sum d_score x over positions by parts.
// Scores stay in natural units: log2(e) folded into q would round them apart from the log-sum-exp that is saved.
#pragma once

#include "cuda/attention.cuh"

namespace mf {

__device__ inline float exponential(float score, float from) { return exp2f((score - from) * float(LOG2_E)); }

// What the parts of the forward pass leave
struct SoftmaxParts {
  float* highest;   // [B][parts][N][M]
  float* total;     // [B][parts][N][M]
  float* gathered;  // [B][parts][M][C]
};

__device__ inline int64_t part_row(const AttentionShape& s, const AttentionPlan& p, int64_t b, int64_t part, int head) {
  return ((b * p.parts + part) * s.N + head) * s.M;
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1) mobile_to_former_channels(SoftmaxParts parts,
                                                                        const T* __restrict__ x,  // (B, L, C)
                                                                        const T* __restrict__ q,  // (B, M, C)
                                                                        AttentionShape s, AttentionPlan p) {
  constexpr int UNROLL = 4;
  __shared__ float shared[THREADS * V];
  __shared__ float of_groups[2][THREADS][M];  // maxima, sums
  const ChannelLane lane(s, p);
  float queries[M][V], gathered[M][V], highest[M], total[M];
  load_token_rows(queries, q, s, lane, s.scale);
  fill(highest, LOWEST), fill(total, 0);
#pragma unroll
  for (int m = 0; m < M; ++m) fill(gathered[m], 0);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base; base < lane.end; base += UNROLL * p.slots) {  // the same steps for all lanes of a warp
    Pack<T, V> loaded[UNROLL];
    float scores[UNROLL][M];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int64_t position = base + u * p.slots + lane.slot;
      loaded[u] = Pack<T, V>{};
      if (lane.active && position < lane.end) loaded[u] = load_pack<V>(x + start + position * s.C);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float here[V];
      widen(here, loaded[u]);
      dot_rows(scores[u], queries, here);
      sum_lanes(scores[u], p.across);
      if (base + u * p.slots + lane.slot >= lane.end) fill(scores[u], -INFINITY);
    }
#pragma unroll
    for (int m = 0; m < M; ++m) {  // one rescaling for all positions of the step
      float top = highest[m];
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) top = fmaxf(top, scores[u][m]);
      const float correction = exponential(highest[m], top);
      highest[m] = top, total[m] *= correction;
#pragma unroll
      for (int i = 0; i < V; ++i) gathered[m][i] *= correction;
#pragma unroll
      for (int u = 0; u < UNROLL; ++u) {
        scores[u][m] = exponential(scores[u][m], top);
        total[m] += scores[u][m];
      }
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float here[V];
      widen(here, loaded[u]);
      add_outer(gathered, scores[u], here);
    }
  }
  // Merge the block's groups: every group of a head to the block's maximum, then sums over them in order
  const int group = threadIdx.x / p.across;
  if (threadIdx.x % p.across == 0) {
#pragma unroll
    for (int m = 0; m < M; ++m) of_groups[0][group][m] = highest[m], of_groups[1][group][m] = total[m];
  }
#ifndef MF_PLANT_RACE
  __syncthreads();
#endif
#pragma unroll
  for (int m = 0; m < M; ++m) {
    float top = LOWEST;
    for (int slot = 0; slot < p.slots; ++slot) top = fmaxf(top, of_groups[0][slot * s.N + lane.head][m]);
    const float correction = exponential(highest[m], top);
#pragma unroll
    for (int i = 0; i < V; ++i) gathered[m][i] *= correction;
    if (group < s.N && threadIdx.x % p.across == 0 && m < s.M) {  // the head's first group
      float sum = 0;
      for (int slot = 0; slot < p.slots; ++slot) {
        sum += of_groups[1][slot * s.N + lane.head][m] * exponential(of_groups[0][slot * s.N + lane.head][m], top);
      }
      const int64_t row = part_row(s, p, lane.b, lane.part, lane.head) + m;
      parts.highest[row] = top, parts.total[row] = sum;
    }
  }
  leave_sums(parts.gathered, gathered, shared, s, p, lane);
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    mobile_to_former_positions(SoftmaxParts parts,
                               const T* __restrict__ x,  // (B, C, L) in any strides
                               const T* __restrict__ q,  // (B, M, C)
                               AttentionShape s, AttentionPlan p) {
  constexpr int PADDED = TokenColumn<M>::PADDED;
  __shared__ TokenColumn<M> columns[CHUNK];
  __shared__ float shared[THREADS * V];
  const PositionLane lane(s, p);
  const auto stage = [&](int64_t first, int count) {
    stage_tokens<T, M>(columns, q, s, lane.b, first, count, s.scale);
  };
  float weights[M][V], totals[PADDED];
#pragma unroll
  for (int m = 0; m < M; ++m) fill(weights[m], 0);
  for_channels<4>(s, lane, stage, [&](int e, int64_t at, int) {
    const TokenColumn<M> query = columns[e];
    float here[V];
    load_if(here, x + at, lane.active);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) weights[m][i] += query.of[m] * here[i];
    }
  });
  sum_slices(weights, shared, lane, p);
  const int64_t row = part_row(s, p, lane.b, lane.part, lane.head);
  fill(totals, 0);
#pragma unroll
  for (int m = 0; m < M; ++m) {  // a warp's positions are a part of their own
    float top = LOWEST;
#pragma unroll
    for (int i = 0; i < V; ++i) top = lane.active ? fmaxf(top, weights[m][i]) : top;
    top = largest_of_lanes(top);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      weights[m][i] = lane.active ? exponential(weights[m][i], top) : 0.0f;
      totals[m] += weights[m][i];
    }
    if (lane.slice == 0 && lane.lane == 0 && m < s.M) parts.highest[row + m] = top;
  }
  const float total = sum_lanes_of_each(totals, lane.lane);
  const int m_of_lane = lane.lane / (WARP / PADDED);
  if (lane.slice == 0 && lane.lane % (WARP / PADDED) == 0 && m_of_lane < s.M) parts.total[row + m_of_lane] = total;

  for_channels<2>(
      s, lane, [](int64_t, int) {},
      [&](int, int64_t at, int in_head) {
        float here[V], sums[PADDED];
        load_if(here, x + at, lane.active);
        fill(sums, 0);
#pragma unroll
        for (int m = 0; m < M; ++m) {
#pragma unroll
          for (int i = 0; i < V; ++i) sums[m] += weights[m][i] * here[i];
        }
        leave_lane_sums(parts.gathered, sums, s, p, lane, lane.channel + in_head);
      });
}

// One thread for each value of out; the parts of a head share the maximum that the exponents are taken from
template <class T>
__global__ void __launch_bounds__(THREADS, 1) merge_parts(T* __restrict__ out,              // (B, M, C)
                                                          float* __restrict__ log_sum_exp,  // (B, N, M), natural
                                                          SoftmaxParts parts, AttentionShape s, AttentionPlan p) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= s.B * s.M * s.C) return;
  const int64_t sample_token = divide(i, s.C), c = i - sample_token * s.C, b = sample_token / s.M;
  const int m = int(sample_token % s.M), head = int(c / s.E);
  float top = LOWEST, total = 0, gathered = 0;
  for (int64_t part = 0; part < p.parts; ++part) top = fmaxf(top, parts.highest[part_row(s, p, b, part, head) + m]);
#pragma unroll 4
  for (int64_t part = 0; part < p.parts; ++part) {
    const int64_t row = part_row(s, p, b, part, head) + m;
    const float correction = exponential(parts.highest[row], top);
    total += parts.total[row] * correction;
    gathered += parts.gathered[((b * p.parts + part) * s.M + m) * s.C + c] * correction;
  }
  from_float(out[i], gathered / total);
  if (c % s.E == 0) log_sum_exp[(b * s.N + head) * s.M + m] = top + logf(total);
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    mobile_to_former_channels_backward(T* __restrict__ d_x,                    // (B, L, C)
                                       float* __restrict__ d_q_parts,          // [B][parts][M][C]
                                       const T* __restrict__ d_out,            // (B, M, C)
                                       const T* __restrict__ x,                // (B, L, C)
                                       const T* __restrict__ q,                // (B, M, C)
                                       const T* __restrict__ out,              // (B, M, C)
                                       const float* __restrict__ log_sum_exp,  // (B, N, M)
                                       AttentionShape s, AttentionPlan p) {
  constexpr int UNROLL = 4;
  __shared__ float shared[THREADS * V];
  const ChannelLane lane(s, p);
  float queries[M][V], d_outs[M][V], d_queries[M][V], lse[M], delta[M];
  load_token_rows(d_queries, out, s, lane, 1);
  load_token_rows(d_outs, d_out, s, lane, 1);
  load_token_rows(queries, q, s, lane, s.scale);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    delta[m] = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) delta[m] += d_queries[m][i] * d_outs[m][i];
    fill(d_queries[m], 0);
    lse[m] = m < s.M ? log_sum_exp[(lane.b * s.N + lane.head) * s.M + m] : INFINITY;
  }
  sum_lanes(delta, p.across);
  const int64_t start = lane.b * s.L * s.C + lane.channel;
  for (int64_t base = lane.base; base < lane.end; base += UNROLL * p.slots) {
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
      const bool inside = lane.active && position < lane.end;
      float here[V], gradient[V], weights[M], d_scores[M];
      widen(here, loaded[u]);
      dot_rows(weights, queries, here), dot_rows(d_scores, d_outs, here);
      sum_lanes(weights, p.across), sum_lanes(d_scores, p.across);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        // Beyond the end scores are 0, and e^0 from a log-sum-exp far below would be infinite: times x = 0, NaN
        weights[m] = inside ? exponential(weights[m], lse[m]) : 0.0f;
        d_scores[m] = weights[m] * (d_scores[m] - delta[m]);
      }
      add_outer(d_queries, d_scores, here);
      fill(gradient, 0);
      add_rows(gradient, d_scores, queries);  // x as the key
      add_rows(gradient, weights, d_outs);    // x as the value
      if (inside) store<V>(d_x + start + position * s.C, gradient);
    }
  }
  leave_sums(d_q_parts, d_queries, shared, s, p, lane);
}

template <class T, int V, int M>
__global__ void __launch_bounds__(THREADS, 1)
    mobile_to_former_positions_backward(T* __restrict__ d_x,                    // (B, C, L) in any strides
                                        float* __restrict__ d_q_parts,          // [B][parts][M][C]
                                        const T* __restrict__ d_out,            // (B, M, C)
                                        const T* __restrict__ x,                // like d_x
                                        const T* __restrict__ q,                // (B, M, C)
                                        const T* __restrict__ out,              // (B, M, C)
                                        const float* __restrict__ log_sum_exp,  // (B, N, M)
                                        AttentionShape s, AttentionPlan p) {
  constexpr int PADDED = TokenColumn<M>::PADDED;
  __shared__ TokenColumn<M> query_columns[CHUNK], d_out_columns[CHUNK];
  __shared__ float shared[THREADS * V];
  __shared__ float delta[MAX_TOKENS];
  const PositionLane lane(s, p);
  const int warp = threadIdx.x / WARP;
  if (warp < s.M) {  // a warp for each token, 8 of both
    float sum = 0;
    const int64_t row = (lane.b * s.M + warp) * s.C + lane.channel;
    for (int e = lane.lane; e < s.E; e += WARP) sum += to_float(d_out[row + e]) * to_float(out[row + e]);
    sum = sum_lanes(sum);
    if (lane.lane == 0) delta[warp] = sum;
  }
  const auto stage = [&](int64_t first, int count) {
    stage_tokens<T, M>(query_columns, q, s, lane.b, first, count, s.scale);
    stage_tokens<T, M>(d_out_columns, d_out, s, lane.b, first, count, 1);
  };
  float weights[M][V], d_scores[M][V];
#pragma unroll
  for (int m = 0; m < M; ++m) fill(weights[m], 0), fill(d_scores[m], 0);
  for_channels<4>(s, lane, stage, [&](int e, int64_t at, int) {  // its barriers order `delta` too
    const TokenColumn<M> query = query_columns[e], gradient = d_out_columns[e];
    float here[V];
    load_if(here, x + at, lane.active);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) weights[m][i] += query.of[m] * here[i], d_scores[m][i] += gradient.of[m] * here[i];
    }
  });
  sum_slices(weights, shared, lane, p), sum_slices(d_scores, shared, lane, p);
#pragma unroll
  for (int m = 0; m < M; ++m) {
    const float lse = m < s.M ? log_sum_exp[(lane.b * s.N + lane.head) * s.M + m] : INFINITY;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      weights[m][i] = lane.active ? exponential(weights[m][i], lse) : 0.0f;
      d_scores[m][i] = m < s.M ? weights[m][i] * (d_scores[m][i] - delta[m]) : 0.0f;
    }
  }
  for_channels<2>(s, lane, stage, [&](int e, int64_t at, int in_head) {
    const TokenColumn<M> query = query_columns[e], d_out_column = d_out_columns[e];
    float here[V], gradient[V], d_query[PADDED];
    load_if(here, x + at, lane.active);
    fill(gradient, 0), fill(d_query, 0);
#pragma unroll
    for (int m = 0; m < M; ++m) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        d_query[m] += d_scores[m][i] * here[i];
        gradient[i] += d_scores[m][i] * query.of[m] + weights[m][i] * d_out_column.of[m];
      }
    }
    leave_lane_sums(d_q_parts, d_query, s, p, lane, lane.channel + in_head);
    if (lane.active) store<V>(d_x + at, gradient);
  });
}

// `memory(floats)` gives scratch memory
template <class T, class Memory>
void launch_mobile_to_former(T* out, float* log_sum_exp, const T* x, const T* q, const AttentionShape& s,
                             const Memory& memory, cudaStream_t stream) {
  constexpr int WIDE = 16 / sizeof(T);
  const auto p = plan_attention(s, {sizeof(T), aligned_16(x)}, WIDE);
  const int64_t rows = s.B * p.parts * s.N * s.M;
  const SoftmaxParts parts{memory(rows), memory(rows), memory(s.B * p.parts * s.M * s.C)};
  with_width<WIDE>(p, [&]<int V, int M>() {
    if constexpr (V > 1) {
      if (p.channel_lanes) return launch(&mobile_to_former_channels<T, V, M>, p.blocks, stream, parts, x, q, s, p);
    }
    launch(&mobile_to_former_positions<T, V, M>, p.blocks, stream, parts, x, q, s, p);
  });
  launch(&merge_parts<T>, divide_up(s.B * s.M * s.C, THREADS), stream, out, log_sum_exp, parts, s, p);
}

// Loads of 4 values: the rows of twice as many would not stay in registers
template <class T, class Memory>
void launch_mobile_to_former_backward(T* d_x, T* d_q, const T* d_out, const T* x, const T* q, const T* out,
                                      const float* log_sum_exp, const AttentionShape& s, const Memory& memory,
                                      cudaStream_t stream) {
  const auto p = plan_attention(s, {sizeof(T), aligned_16(d_x, x)}, 4);
  float* d_q_parts = memory(s.B * p.parts * s.M * s.C);
  with_width<4>(p, [&]<int V, int M>() {
    if constexpr (V > 1) {
      if (p.channel_lanes) {
        return launch(&mobile_to_former_channels_backward<T, V, M>, p.blocks, stream, d_x, d_q_parts, d_out, x, q, out,
                      log_sum_exp, s, p);
      }
    }
    launch(&mobile_to_former_positions_backward<T, V, M>, p.blocks, stream, d_x, d_q_parts, d_out, x, q, out,
           log_sum_exp, s, p);
  });
  launch_sum_parts(d_q, d_q_parts, s.B, int64_t(s.M) * s.C, p.parts, s.scale, stream);
}

}  // namespace mf
