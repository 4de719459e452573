// What both attentions share: the shape, how a call is laid out on the device, token rows, sums over threads.
//
// Legend: B batch, C channels, L = H*W positions, M tokens (at most 8), N heads, E = C/N, T stored type, V values a load.
// Two ways through a map:
//   channel lanes   channels_last: a group of lanes holds the E channels of one head of one position, V each; token rows
//                   stay in registers, dot products are sums over the group. Groups of one position are neighbours.
//   position lanes  contiguous, and shapes that the first cannot hold: a thread holds V positions and walks the channels
//                   of one head; token rows lie in shared memory. Where positions alone would leave a block half empty,
//                   its threads form slices that share out the channels. Channels are walked twice, scores first: the
//                   second time a tile, a few thousand values, comes from the caches.
// Kernels are compiled for 4, 6 and 8 tokens; a call takes the next one up, with rows of zeros that no softmax counts.
// No model has 7 or 8 tokens: those are compiled for loads of at most 4 values.
#pragma once

#include "cuda/device.cuh"

namespace mf {

struct AttentionShape {
  int64_t B, C, L, channel_stride, position_stride;
  int M, N, E;
  float scale;  // E^-0.5
};

inline AttentionShape attention_shape(int64_t B, int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  return {B,      C,      L,          channels_last ? 1 : L,     channels_last ? C : 1,
          int(M), int(N), int(C / N), 1.0f / sqrtf(float(C / N))};
}

struct AttentionPlan {
  bool channel_lanes;
  int vector, tokens;  // V, and the M that is compiled
  int across;          // channel lanes: lanes of a group; position lanes: threads along positions
  int slots;           // positions that a block holds at once; position lanes: loads of positions
  int64_t parts;       // partial sums of a sample (channel lanes) or of a head (position lanes)
  int64_t per_part;    // channel lanes: positions of one
  int64_t tiles;       // position lanes: blocks of a head
  int64_t blocks;
};

// `widest`: the most values a load that the kernel is compiled for
inline AttentionPlan plan_attention(const AttentionShape& s, Access access, int widest) {
  AttentionPlan p{};
  p.tokens = s.M <= 4 ? 4 : s.M <= 6 ? 6 : 8;
  if (p.tokens == 8) widest = int(smaller(widest, 4));
  const bool channels_last = s.channel_stride == 1 && s.position_stride != 1;
  const int V = int(smaller(widest, access.values(s.E, true)));
  const int lanes = s.E / V <= WARP ? int(divide_up(s.E, V)) : THREADS;
  int group = 1;
  while (group < lanes) group *= 2;
  if (channels_last && V > 1 && group <= WARP && THREADS / group >= s.N) {
    p.channel_lanes = true, p.vector = V, p.across = group;
    p.slots = THREADS / group / s.N;
    const int64_t steps = divide_up(s.L, p.slots);
    p.per_part = divide_up(steps, parts_of(steps, s.B, 8)) * p.slots;
    p.parts = divide_up(s.L, p.per_part);
    p.blocks = s.B * p.parts;
    return p;
  }
  p.vector = channels_last ? 1 : int(smaller(widest, access.values(s.L, true)));
  if (p.vector == 1) p.tokens = 8;  // the way for odd shapes: one kernel for any M
  p.across = THREADS / 2;
  const int64_t loads = divide_up(s.L, p.vector);
  while (p.across > WARP && (loads <= p.across / 2 || s.B * s.N * divide_up(loads, p.across) < BLOCKS_WANTED / 4))
    p.across /= 2;
  p.slots = p.across;
  p.tiles = divide_up(loads, p.across);
  p.parts = p.tiles * (p.across / WARP);
  p.blocks = s.B * s.N * p.tiles;
  return p;
}

// Channel lanes: where a thread stands
struct ChannelLane {
  int64_t b, part, channel, base, end;  // channel: of the sample, the first of V; base: the first slot's position
  int head, slot;
  bool active;
  __device__ ChannelLane(const AttentionShape& s, const AttentionPlan& p) {
    b = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const int group = threadIdx.x / p.across, at = threadIdx.x % p.across * p.vector;
    head = group % s.N, slot = group / s.N;
    active = slot < p.slots && at < s.E;
    channel = int64_t(head) * s.E + at;
    base = part * p.per_part, end = smaller(s.L, base + p.per_part);
  }
};

// rows[m] = factor * tokens[b][m][channel ...]; zeros beyond M and for threads without channels
template <class T, int M, int V>
__device__ inline void load_token_rows(float (&rows)[M][V], const T* tokens, const AttentionShape& s,
                                       const ChannelLane& lane, float factor) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) {  // once a block: tokens may lie at any address
      rows[m][i] =
          lane.active && m < s.M ? factor * to_float(tokens[(lane.b * s.M + m) * s.C + lane.channel + i]) : 0.0f;
    }
  }
}

template <int M, int V>
__device__ inline void dot_rows(float (&dots)[M], const float (&rows)[M][V], const float (&x)[V]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    dots[m] = 0;
#pragma unroll
    for (int i = 0; i < V; ++i) dots[m] += rows[m][i] * x[i];
  }
}

template <int M, int V>
__device__ inline void add_rows(float (&sum)[V], const float (&factors)[M], const float (&rows)[M][V]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += factors[m] * rows[m][i];
  }
}

// sums[m] += factors[m] * x
template <int M, int V>
__device__ inline void add_outer(float (&sums)[M][V], const float (&factors)[M], const float (&x)[V]) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
#pragma unroll
    for (int i = 0; i < V; ++i) sums[m][i] += factors[m] * x[i];
  }
}

// Scores (base 2) in, softmax over the first `count` of them out, zeros beyond
template <int M>
__device__ inline void softmax_over_tokens(float (&scores)[M], int count) {
  float top = scores[0], total = 0;
#pragma unroll
  for (int m = 1; m < M; ++m) top = m < count ? fmaxf(top, scores[m]) : top;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    scores[m] = m < count ? exp2f(scores[m] - top) : 0.0f;
    total += scores[m];
  }
  const float inverse = 1.0f / total;
#pragma unroll
  for (int m = 0; m < M; ++m) scores[m] *= inverse;
}

// Channel lanes: partials[b][part][m][c] = sum over the block's slots, always in the same order
template <int M, int V>
__device__ inline void leave_sums(float* partials, const float (&sums)[M][V], float* shared,  // [THREADS * V]
                                  const AttentionShape& s, const AttentionPlan& p, const ChannelLane& lane) {
#pragma unroll
  for (int m = 0; m < M; ++m) {
    if (m >= s.M) break;
#pragma unroll
    for (int i = 0; i < V; ++i) shared[threadIdx.x * V + i] = sums[m][i];
    __syncthreads();
    for (int c = threadIdx.x; c < s.C; c += THREADS) {
      const int head = c / s.E, at = head * p.across * V + c % s.E;
      float total = 0;
      for (int slot = 0; slot < p.slots; ++slot) total += shared[slot * s.N * p.across * V + at];
      partials[((lane.b * p.parts + lane.part) * s.M + m) * s.C + c] = total;
    }
    __syncthreads();
  }
}

// Position lanes: where a thread stands
struct PositionLane {
  int64_t b, part, channel, position, offset;  // channel: the head's first; offset: of its value at `position`
  int head, slice, slices, across, lane;
  bool active;
  __device__ PositionLane(const AttentionShape& s, const AttentionPlan& p) {
    const int64_t tile = blockIdx.x % p.tiles, sample_head = blockIdx.x / p.tiles;
    b = sample_head / s.N, head = int(sample_head % s.N);
    across = threadIdx.x % p.across, slice = threadIdx.x / p.across, slices = THREADS / p.across;
    lane = threadIdx.x % WARP;
    part = tile * (p.across / WARP) + across / WARP;
    position = (tile * p.across + across) * p.vector;
    active = position < s.L;
    channel = int64_t(head) * s.E;
    offset = b * s.C * s.L + channel * s.channel_stride + position * s.position_stride;
  }
};

constexpr int CHUNK = 128;  // channels whose token rows lie in shared memory at once

// A channel's tokens, in whole 16-byte reads
template <int M>
struct alignas(16) TokenColumn {
  static constexpr int PADDED = M <= 4 ? 4 : 8;
  float of[PADDED];
};

// columns[e].of[m] = factor * tokens[b][m][first + e] for `count` channels; the caller synchronises before and after
template <class T, int M>
__device__ inline void stage_tokens(TokenColumn<M>* columns, const T* tokens, const AttentionShape& s, int64_t b,
                                    int64_t first, int count, float factor) {
  for (int i = threadIdx.x; i < count * M; i += THREADS) {
    const int m = i / count, e = i % count;
    columns[e].of[m] = m < s.M ? factor * to_float(tokens[(b * s.M + m) * s.C + first + e]) : 0.0f;
  }
}

// Calls body(e) for the channels of this thread's slice, chunk by chunk, once stage(first, count) has staged them
// UNROLL of them at a time, so that as many loads are in flight
template <int UNROLL, class Stage, class Body>
__device__ inline void for_channels(const AttentionShape& s, const PositionLane& lane, const Stage& stage,
                                    const Body& body) {
  for (int first = 0; first < s.E; first += CHUNK) {
    const int count = int(smaller(CHUNK, s.E - first));
    __syncthreads();
    stage(lane.channel + first, count);
    __syncthreads();
#pragma unroll UNROLL
    for (int e = lane.slice; e < count; e += lane.slices)
      body(e, lane.offset + (first + e) * s.channel_stride, first + e);
  }
}

template <int V, class T>
__device__ inline void load_if(float (&to)[V], const T* source, bool active) {
  if (active) {
    load<V>(to, source);
  } else {
    fill(to, 0);
  }
}

// values[m] = sum over the slices of the same positions; every slice gets it
template <int M, int V>
__device__ inline void sum_slices(float (&values)[M][V], float* shared,  // [THREADS * V]
                                  const PositionLane& lane, const AttentionPlan& p) {
  if (lane.slices == 1) return;
#pragma unroll
  for (int m = 0; m < M; ++m) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) shared[i * THREADS + threadIdx.x] = values[m][i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < V; ++i) {
      values[m][i] = 0;
      for (int slice = 0; slice < lane.slices; ++slice)
        values[m][i] += shared[i * THREADS + slice * p.across + lane.across];
    }
  }
}

// Position lanes: partials[b][part][m][c] = sum of values[m] over the warp's positions
template <int COUNT>
__device__ inline void leave_lane_sums(float* partials, float (&values)[COUNT], const AttentionShape& s,
                                       const AttentionPlan& p, const PositionLane& lane, int64_t c) {
  const float total = sum_lanes_of_each(values, lane.lane);
  const int m = lane.lane / (WARP / COUNT);
  if (lane.lane % (WARP / COUNT) == 0 && m < s.M)
    partials[((lane.b * p.parts + lane.part) * s.M + m) * s.C + c] = total;
}

// Calls f.template operator()<V, M>() with the plan's V, one of WIDE, 4 and 1, and the plan's M
template <int WIDE, class F>
void with_width(const AttentionPlan& p, const F& f) {
  const auto with_tokens = [&]<int V>() {
    if (p.tokens == 4) return f.template operator()<V, 4>();
    if constexpr (V <= 4) {
      if (p.tokens == 8) return f.template operator()<V, 8>();
    }
    return f.template operator()<V, 6>();
  };
  if (p.vector == 1) return f.template operator()<1, 8>();
  if constexpr (WIDE != 4) {
    if (p.vector == WIDE) return with_tokens.template operator()<WIDE>();
  }
  return with_tokens.template operator()<4>();
}

}  // namespace mf
