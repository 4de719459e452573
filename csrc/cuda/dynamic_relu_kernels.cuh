// Dynamic ReLU on CUDA: y = max(a1 x, a2 x), slopes per sample and channel. Source: mf_kernels/reference.py, dynamic_relu.
//
// Legend: B batch, C channels, L = H*W positions, T stored type, V values a load.
// Streaming: every value is read and written once. Contiguous maps are read as one run of values, so that the odd planes
// of 7 x 7 maps still move 16 bytes at a time. channels_last samples are read as rows of `run` positions, the fewest that
// fill whole loads; a thread keeps one column of the rows, so its channels and their slopes stay in registers.
// Backward sums per channel inside a block; where positions are split over blocks, `finish_slopes` adds up the parts.
#pragma once

#include "cuda/device.cuh"

namespace mf {

// How a call is laid out on the device: a function of shape, layout and alignment alone
struct DynamicReluPlan {
  bool channels_last;
  int vector;       // V
  int64_t columns;  // channels_last: loads in a row; contiguous: lanes of a plane
  int64_t rows;     // channels_last: rows of a sample; contiguous: loads that a plane touches
  int64_t run;      // positions of a row
  int across;       // threads along the columns
  int64_t column_blocks, parts, rows_per_part, blocks;
};

inline DynamicReluPlan plan_dynamic_relu(int64_t B, int64_t C, int64_t L, Access access, bool channels_last,
                                         bool backward) {
  DynamicReluPlan p{channels_last, 1, C, L, 1, 1, 1, 1, 1, 0};
  const int widest = 16 / access.bytes;
  if (channels_last) {
    int common = widest;  // greatest common divisor of C and V, both positive
    while (C % common != 0) common /= 2;
    const int64_t run = widest / common;
    if (access.aligned && L % run == 0 && (run == 1 || C / common <= THREADS))
      p.vector = widest, p.run = run, p.columns = C / common, p.rows = L / run;
    p.column_blocks = divide_up(p.columns, THREADS);
    p.across = int(divide_up(p.columns, p.column_blocks));
    const int64_t slots = THREADS / p.across, outer = B * p.column_blocks;
    p.parts = parts_of(divide_up(p.rows, slots), outer, backward ? 8 : 4);
    p.rows_per_part = divide_up(divide_up(p.rows, p.parts), slots) * slots;
    p.parts = divide_up(p.rows, p.rows_per_part);
    p.blocks = outer * p.parts;
    return p;
  }
  if (access.aligned) p.vector = widest;
  if (!backward) {
    p.blocks = divide_up(B * C * L, int64_t(THREADS) * 4 * p.vector);
    return p;
  }
  p.rows = divide_up(L, p.vector) + (L % p.vector != 0);
  p.across = 8;
  while (p.across < THREADS && p.across < p.rows &&
         (p.rows > 4 * p.across || divide_up(B * C * p.across, THREADS) < BLOCKS_WANTED / 4)) {
    p.across *= 2;
  }
  const int64_t groups = divide_up(B * C * p.across, THREADS);
  p.parts = p.across == THREADS ? parts_of(divide_up(p.rows, THREADS), groups, 4) : 1;
  p.rows_per_part = divide_up(p.rows, p.parts);
  p.parts = divide_up(p.rows, p.rows_per_part);
  p.blocks = groups * p.parts;
  return p;
}

template <class T>
__device__ inline float slope1_of(const T* theta, int64_t b, int64_t c, int64_t C) {
  return dynamic_relu_slope1(to_float(theta[b * 2 * C + c]));
}
template <class T>
__device__ inline float slope2_of(const T* theta, int64_t b, int64_t c, int64_t C) {
  return dynamic_relu_slope2(to_float(theta[b * 2 * C + C + c]));
}

// d_x of one value; adds its share of the slopes' gradients
__device__ inline float dynamic_relu_gradient(float x, float d_y, float slope1, float slope2, float& d_slope1,
                                              float& d_slope2) {
  const float share = first_line_share(slope1 * x, slope2 * x);
  const float gradient1 = d_y * share, gradient2 = d_y - gradient1;
  d_slope1 += gradient1 * x;
  d_slope2 += gradient2 * x;
  return gradient1 * slope1 + gradient2 * slope2;
}

// Contiguous: four loads a thread, anywhere in the run of all values
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1) dynamic_relu_flat(T* __restrict__ y,            // (B, C, L)
                                                                const T* __restrict__ x,      // (B, C, L)
                                                                const T* __restrict__ theta,  // (B, 2C)
                                                                int64_t C, int64_t L, int64_t total) {
  const int64_t first = (int64_t(blockIdx.x) * THREADS * 4 + threadIdx.x) * V;
  Pack<T, V> loaded[4];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const int64_t at = first + int64_t(u) * THREADS * V;
    if (at + V <= total) loaded[u] = load_pack<V>(x + at);
  }
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const int64_t at = first + int64_t(u) * THREADS * V;
    if (at >= total) continue;
    const int here = int(smaller(V, total - at));  // below V in the last load of the map only
    int64_t plane = divide(at, L), left = (plane + 1) * L - at, b = divide(plane, C);
    float slope1 = slope1_of(theta, b, plane - b * C, C), slope2 = slope2_of(theta, b, plane - b * C, C), out[V];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      if (i >= here) break;
      if (left == 0) {  // the next plane begins inside this load
        ++plane, left = L, b = divide(plane, C);
        slope1 = slope1_of(theta, b, plane - b * C, C), slope2 = slope2_of(theta, b, plane - b * C, C);
      }
      --left;
      const float value = to_float(here == V ? loaded[u].value[i] : x[at + i]);
      out[i] = larger_or_nan(slope1 * value, slope2 * value);
      if (here < V) from_float(y[at + i], out[i]);
    }
    if (here == V) store<V>(y + at, out);
  }
}

// Which rows and which column of a channels_last sample a thread walks
struct RowWalk {
  int64_t b, part, column, first, end;
  int slot, slots;
  bool active;
  __device__ RowWalk(const DynamicReluPlan& p) {
    const int64_t block = blockIdx.x, column_block = block % p.column_blocks, sample_part = block / p.column_blocks;
    part = sample_part % p.parts, b = sample_part / p.parts;
    slots = THREADS / p.across, slot = threadIdx.x / p.across;
    column = column_block * p.across + threadIdx.x % p.across;
    active = slot < slots && column < p.columns;
    first = part * p.rows_per_part + slot, end = smaller(p.rows, (part + 1) * p.rows_per_part);
  }
};

template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1) dynamic_relu_rows(T* __restrict__ y,            // (B, L, C)
                                                                const T* __restrict__ x,      // (B, L, C)
                                                                const T* __restrict__ theta,  // (B, 2C)
                                                                int64_t C, int64_t L, DynamicReluPlan p) {
  const RowWalk walk(p);
  if (!walk.active) return;
  float slope1[V], slope2[V];
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const int64_t c = (walk.column * V + i) % C;
    slope1[i] = slope1_of(theta, walk.b, c, C), slope2[i] = slope2_of(theta, walk.b, c, C);
  }
  const int64_t start = walk.b * L * C + walk.column * V;
  for (int64_t row = walk.first; row < walk.end; row += 4 * walk.slots) {
    Pack<T, V> loaded[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int64_t r = row + u * walk.slots;
      if (r < walk.end) loaded[u] = load_pack<V>(x + start + r * p.columns * V);
    }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const int64_t r = row + u * walk.slots;
      float value[V];
      widen(value, loaded[u]);
#pragma unroll
      for (int i = 0; i < V; ++i) value[i] = larger_or_nan(slope1[i] * value[i], slope2[i] * value[i]);
      if (r < walk.end) store<V>(y + start + r * p.columns * V, value);
    }
  }
}

// Gradients of theta from those of the slopes; a1 and a2 are both 2 hsig(theta) + const
template <class T>
__device__ inline void finish_slope(T* d_theta, const T* theta, int64_t at, float d_slope) {
  from_float(d_theta[at], slope_gradient(d_slope, to_float(theta[at])));
}

// d_slopes of one part go to the partial sums, or, where there is one part only, straight to d_theta
template <class T>
__device__ inline void leave_slopes(T* d_theta, const T* theta, float* partials, int64_t parts, int64_t part, int64_t b,
                                    int64_t c, int64_t C, float d_slope1, float d_slope2) {
  if (parts == 1) {
    finish_slope(d_theta, theta, b * 2 * C + c, d_slope1);
    finish_slope(d_theta, theta, b * 2 * C + C + c, d_slope2);
  } else {
    float* target = partials + (b * parts + part) * 2 * C + c;
    target[0] = d_slope1, target[C] = d_slope2;
  }
}

template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1)
    dynamic_relu_rows_backward(T* __restrict__ d_x,           // (B, L, C)
                               T* __restrict__ d_theta,       // (B, 2C)
                               float* __restrict__ partials,  // [B][parts][2C]
                               const T* __restrict__ d_y,     // (B, L, C)
                               const T* __restrict__ x,       // (B, L, C)
                               const T* __restrict__ theta,   // (B, 2C)
                               int64_t C, int64_t L, DynamicReluPlan p) {
  __shared__ float sums[2][THREADS * V];
  const RowWalk walk(p);
  float slope1[V], slope2[V], d_slope1[V], d_slope2[V];
  fill(d_slope1, 0), fill(d_slope2, 0);
  if (walk.active) {
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const int64_t c = (walk.column * V + i) % C;
      slope1[i] = slope1_of(theta, walk.b, c, C), slope2[i] = slope2_of(theta, walk.b, c, C);
    }
    const int64_t start = walk.b * L * C + walk.column * V;
    for (int64_t row = walk.first; row < walk.end; row += 2 * walk.slots) {
      Pack<T, V> loaded[2], loaded_d[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int64_t at = start + (row + u * walk.slots) * p.columns * V;
        if (row + u * walk.slots < walk.end) loaded[u] = load_pack<V>(x + at), loaded_d[u] = load_pack<V>(d_y + at);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        if (row + u * walk.slots >= walk.end) continue;
        float value[V], gradient[V];
        widen(value, loaded[u]), widen(gradient, loaded_d[u]);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          gradient[i] = dynamic_relu_gradient(value[i], gradient[i], slope1[i], slope2[i], d_slope1[i], d_slope2[i]);
        }
        store<V>(d_x + start + (row + u * walk.slots) * p.columns * V, gradient);
      }
    }
  }
  // sums[.][slot][value of the row], then one thread a channel over the slots and the positions of a row
#pragma unroll
  for (int i = 0; i < V; ++i) sums[0][threadIdx.x * V + i] = d_slope1[i], sums[1][threadIdx.x * V + i] = d_slope2[i];
#ifndef MF_PLANT_RACE
  __syncthreads();
#endif
  const int64_t first = (walk.column - threadIdx.x % p.across) * V;  // of the block's values in the row
  const int width = p.across * V;                                    // values of the row that the block has
  const int channels = int(smaller(C, width));
  for (int at = threadIdx.x; at < channels && first + at < C; at += THREADS) {
    float total1 = 0, total2 = 0;
    for (int slot = 0; slot < walk.slots; ++slot) {
      for (int i = at; i < width; i += channels) {
        total1 += sums[0][slot * width + i], total2 += sums[1][slot * width + i];
      }
    }
    leave_slopes(d_theta, theta, partials, p.parts, walk.part, walk.b, first + at, C, total1, total2);
  }
}

// Contiguous: `across` lanes walk the loads that a plane touches; the first and the last may reach into its neighbours
template <class T, int V>
__global__ void __launch_bounds__(THREADS, 1)
    dynamic_relu_planes_backward(T* __restrict__ d_x,           // (B, C, L)
                                 T* __restrict__ d_theta,       // (B, 2C)
                                 float* __restrict__ partials,  // [B][parts][2C]
                                 const T* __restrict__ d_y,     // (B, C, L)
                                 const T* __restrict__ x,       // (B, C, L)
                                 const T* __restrict__ theta,   // (B, 2C)
                                 int64_t planes, int64_t C, int64_t L, DynamicReluPlan p) {
  __shared__ float sums[2][THREADS / WARP];
  const int64_t group = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
  const int64_t plane = group * (THREADS / p.across) + threadIdx.x / p.across;
  const int64_t b = divide(plane, C), c = plane - b * C;
  float d_slope1 = 0, d_slope2 = 0;
  if (plane < planes) {
    const float slope1 = slope1_of(theta, b, c, C), slope2 = slope2_of(theta, b, c, C);
    const int64_t begin = plane * L, end = begin + L, total = planes * L, base = begin / V;
    const int64_t last = smaller(divide_up(end, V), base + (part + 1) * p.rows_per_part);
    for (int64_t i = base + part * p.rows_per_part + threadIdx.x % p.across; i < last; i += 2 * p.across) {
      Pack<T, V> loaded[2], loaded_d[2];
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int64_t at = (i + u * p.across) * V;
        if (i + u * p.across < last && at + V <= total)
          loaded[u] = load_pack<V>(x + at), loaded_d[u] = load_pack<V>(d_y + at);
      }
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const int64_t at = (i + u * p.across) * V;
        if (i + u * p.across >= last) continue;
        const bool whole = at >= begin && at + V <= end, inside = at + V <= total;
        float out[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if (at + j < begin || at + j >= end) continue;
          const float value = to_float(inside ? loaded[u].value[j] : x[at + j]);
          const float gradient = to_float(inside ? loaded_d[u].value[j] : d_y[at + j]);
          out[j] = dynamic_relu_gradient(value, gradient, slope1, slope2, d_slope1, d_slope2);
          if (!whole) from_float(d_x[at + j], out[j]);
        }
        if (whole) store<V>(d_x + at, out);
      }
    }
  }
  const int width = int(smaller(p.across, WARP)), warp = threadIdx.x / WARP, warps = p.across / WARP;
  d_slope1 = sum_lanes(d_slope1, width), d_slope2 = sum_lanes(d_slope2, width);
  if (threadIdx.x % WARP == 0) sums[0][warp] = d_slope1, sums[1][warp] = d_slope2;
  __syncthreads();
  if (plane >= planes || threadIdx.x % p.across != 0) return;
  for (int w = 1; w < warps; ++w) d_slope1 += sums[0][warp + w], d_slope2 += sums[1][warp + w];
  leave_slopes(d_theta, theta, partials, p.parts, part, b, c, C, d_slope1, d_slope2);
}

template <class T>
__global__ void __launch_bounds__(THREADS, 1) finish_slopes(T* __restrict__ d_theta,             // (B, 2C)
                                                            const float* __restrict__ partials,  // [B][parts][2C]
                                                            const T* __restrict__ theta,         // (B, 2C)
                                                            int64_t count, int64_t width, int64_t parts) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= count) return;
  const int64_t b = divide(i, width);
  float total = 0;
  for (int64_t part = 0; part < parts; ++part) total += partials[(b * parts + part) * width + (i - b * width)];
  finish_slope(d_theta, theta, i, total);
}

template <class T>
void launch_dynamic_relu(T* y, const T* x, const T* theta, int64_t B, int64_t C, int64_t L, bool channels_last,
                         cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto p = plan_dynamic_relu(B, C, L, {sizeof(T), aligned_16(y, x)}, channels_last, false);
  if (channels_last) {
    launch(p.vector == V ? &dynamic_relu_rows<T, V> : &dynamic_relu_rows<T, 1>, p.blocks, stream, y, x, theta, C, L, p);
  } else {
    launch(p.vector == V ? &dynamic_relu_flat<T, V> : &dynamic_relu_flat<T, 1>, p.blocks, stream, y, x, theta, C, L,
           B * C * L);
  }
}

// `partials(floats)` gives memory for that many
template <class T, class Memory>
void launch_dynamic_relu_backward(T* d_x, T* d_theta, const T* d_y, const T* x, const T* theta, int64_t B, int64_t C,
                                  int64_t L, bool channels_last, const Memory& memory, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const auto p = plan_dynamic_relu(B, C, L, {sizeof(T), aligned_16(d_x, d_y, x)}, channels_last, true);
  float* partials = p.parts > 1 ? memory(B * p.parts * 2 * C) : nullptr;
  if (channels_last) {
    launch(p.vector == V ? &dynamic_relu_rows_backward<T, V> : &dynamic_relu_rows_backward<T, 1>, p.blocks, stream, d_x,
           d_theta, partials, d_y, x, theta, C, L, p);
  } else {
    launch(p.vector == V ? &dynamic_relu_planes_backward<T, V> : &dynamic_relu_planes_backward<T, 1>, p.blocks, stream,
           d_x, d_theta, partials, d_y, x, theta, B * C, C, L, p);
  }
  if (p.parts > 1) {
    launch(&finish_slopes<T>, divide_up(B * 2 * C, THREADS), stream, d_theta, partials, theta, B * 2 * C, 2 * C,
           p.parts);
  }
}

}  // namespace mf
