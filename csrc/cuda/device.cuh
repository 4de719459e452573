// What every CUDA kernel here uses: loads and stores of 16 bytes, sums over lanes, and how a grid is launched and sized.
//
// Legend: T stored type, V values a load, lane a thread of a warp of 32. Everything is computed in float.
// Kernels hold no more of CUDA than this and run on the host too (tests/emulator). The MF_PLANT_ macros are faults that
// the sanitizers' tests switch on to see that they are found.
#pragma once

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "common/math.h"

namespace mf {

constexpr int THREADS = 256;  // of a block, everywhere
constexpr int WARP = 32;
// Grids are sized to give each of about 132 multiprocessors its 8 blocks several times over: the last, partly filled
// round of blocks then costs little.
constexpr int64_t BLOCKS_WANTED = 132 * 8 * 4;
constexpr int64_t BLOCKS_NEEDED = 132 * 2;  // what a small call is cut up to
constexpr float LOWEST = -3.402823466e38f;  // a running maximum begins here: finite, so that it never makes inf - inf

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline void from_float(float& target, float value) { target = value; }
__device__ inline void from_float(__half& target, float value) { target = __float2half_rn(value); }
__device__ inline void from_float(__nv_bfloat16& target, float value) { target = __float2bfloat16_rn(value); }

template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// V neighbours in one access; the address is a multiple of their size
template <int V, class T>
__device__ inline Pack<T, V> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, V>*>(source);
}

template <class T, int V>
__device__ inline void widen(float (&to)[V], const Pack<T, V>& pack) {
#pragma unroll
  for (int i = 0; i < V; ++i) to[i] = to_float(pack.value[i]);
}

template <int V, class T>
__device__ inline void load(float (&to)[V], const T* source) {
  widen(to, load_pack<V>(source));
}

template <int V, class T>
__device__ inline void store(T* target, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int i = 0; i < V; ++i) from_float(pack.value[i], from[i]);
#ifndef MF_EMULATOR
  // Spelt out: between the selections of a dynamic ReLU the compiler takes such a store apart. Not a "memory" clobber,
  // which would keep later loads behind it: nothing that is stored here is read again by the same kernel.
  if constexpr (sizeof(pack) >= 8) {
    unsigned words[sizeof(pack) / 4];
    memcpy(words, &pack, sizeof(pack));
    const size_t address = __cvta_generic_to_global(target);
    if constexpr (sizeof(pack) == 16) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(words[0]), "r"(words[1]),
                   "r"(words[2]), "r"(words[3]));
    } else {
      asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]));
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, V>*>(target) = pack;
}

template <int N>
__device__ inline void fill(float (&values)[N], float value) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = value;
}

// The sum over aligned groups of `width` lanes, a power of two; every lane of the group gets it
__device__ inline float sum_lanes(float value, int width = WARP) {
  for (int distance = width / 2; distance > 0; distance /= 2) value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

// The same of N values at once
template <int N>
__device__ inline void sum_lanes(float (&values)[N], int width = WARP) {
  for (int distance = width / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] += __shfl_xor_sync(~0u, values[i], distance);
  }
}

__device__ inline float largest_of_lanes(float value) {
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

// Sums COUNT values, a power of two, over the warp. Lane l returns the sum of value number l / (32 / COUNT).
// Each exchange halves what a lane still has to sum, so COUNT values cost about COUNT shuffles and not 5 COUNT.
template <int COUNT>
__device__ inline float sum_lanes_of_each(float (&values)[COUNT], int lane) {
#pragma unroll
  for (int half = COUNT / 2, distance = WARP / 2; half > 0; half /= 2, distance /= 2) {
    const bool upper = lane & distance;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float given = upper ? values[i] : values[i + half];
      values[i] = (upper ? values[i + half] : values[i]) + __shfl_xor_sync(~0u, given, distance);
    }
  }
#pragma unroll
  for (int distance = WARP / COUNT / 2; distance > 0; distance /= 2) {
    values[0] += __shfl_xor_sync(~0u, values[0], distance);
  }
  return values[0];
}

// Division that takes the short way where both numbers have 32 bits
__device__ inline int64_t divide(int64_t a, int64_t b) {
  return ((a | b) >> 32) == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

MF_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
MF_HOST_DEVICE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
MF_HOST_DEVICE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// In how many parts to cut `steps` steps that `outer` blocks would walk: so many that a part has `least` steps or more,
// but where that leaves multiprocessors idle as many as there are steps
constexpr int64_t parts_of(int64_t steps, int64_t outer, int64_t least) {
  outer = larger(outer, 1);
  const int64_t parts = larger(1, smaller(divide_up(BLOCKS_WANTED, outer), steps / least));
  return outer * parts >= BLOCKS_NEEDED ? parts : larger(1, smaller(divide_up(BLOCKS_NEEDED, outer), steps));
}

// The number of values that one access takes: 16 bytes where `count` values in a row and the pointers allow, else 8, else 1
struct Access {
  int bytes;  // of one value
  bool aligned;
  constexpr int values(int64_t count, bool half_too) const {
    if (aligned && count % (16 / bytes) == 0) return 16 / bytes;
    if (aligned && half_too && bytes < 4 && count % 4 == 0) return 4;
    return 1;
  }
};

template <class... Pointers>
bool aligned_16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// A grid of no blocks is nothing to do. The caller asks cudaGetLastError once, after the last of its launches.
#ifdef MF_EMULATOR
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t, Arguments... arguments) {
  if (blocks > 0 && mf_emulator::wants_to_run(reinterpret_cast<const void*>(kernel)))
    mf_emulator::run(blocks, THREADS, [&] { kernel(arguments...); });
}
#else
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, cudaStream_t stream, Arguments... arguments) {
  if (blocks > 0) kernel<<<unsigned(blocks), THREADS, 0, stream>>>(arguments...);
}
#endif

// target[i] = factor * sum over `parts` of partials[part][i]: the second stage of every sum over positions
template <class T>
__global__ void __launch_bounds__(THREADS, 1)
    sum_parts(T* target,              // [count]
              const float* partials,  // [outer][parts][inner], count = outer*inner
              int64_t count, int64_t inner, int64_t parts, float factor) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
#ifdef MF_PLANT_OVERFLOW
  if (i > count) return;
#else
  if (i >= count) return;
#endif
  const int64_t outer = divide(i, inner);
  const float* source = partials + outer * parts * inner + (i - outer * inner);
  float total = 0;
#pragma unroll 4
  for (int64_t part = 0; part < parts; ++part) total += source[part * inner];
  from_float(target[i], factor * total);
}

template <class T>
void launch_sum_parts(T* target, const float* partials, int64_t outer, int64_t inner, int64_t parts, float factor,
                      cudaStream_t stream) {
  launch(&sum_parts<T>, divide_up(outer * inner, THREADS), stream, target, partials, outer * inner, inner, parts,
         factor);
}

}  // namespace mf
