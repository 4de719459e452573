// Runs CUDA kernels on the host, one block at a time. For tests only; included before everything else (-include).
//
// __shared__ memory is static, __syncthreads is a barrier of the block, warp shuffles go through a barrier of the warp.
// A thread that leaves its kernel early drops out of the barriers, as on the device. Two engines:
//   emulator_fibers.h    every CUDA thread a fiber of one host thread: quick, for the numbers
//   emulator_threads.h   every CUDA thread a host thread: what the sanitizers watch (-DMF_EMULATOR_THREADS)
#pragma once

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <set>

#define MF_EMULATOR 1
#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

namespace mf_emulator {

constexpr int WARP = 32;

// The kernels that were launched since somebody cleared it, and whether they are only told and not run
inline std::set<const void*> launched;
inline bool only_told = false;

inline bool wants_to_run(const void* kernel) {
  launched.insert(kernel);
  return !only_told;
}

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

}  // namespace mf_emulator

#ifdef MF_EMULATOR_THREADS
#include "emulator_threads.h"
#else
#include "emulator_fibers.h"
#endif

// From the engine: thread_index(), block_index(), block_barrier(), warp_barrier(), exchange() (32 words of the warp), run()
#define threadIdx (mf_emulator::thread_index())
#define blockIdx (mf_emulator::block_index())

inline void __syncthreads() { mf_emulator::block_barrier(); }
inline void __syncwarp(unsigned = ~0u) { mf_emulator::warp_barrier(); }

template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int distance) {
  static_assert(sizeof(Value) == sizeof(uint32_t));
  const int lane = threadIdx.x % mf_emulator::WARP;
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  mf_emulator::exchange()[lane] = bits;
  mf_emulator::warp_barrier();
  bits = mf_emulator::exchange()[lane ^ distance];
  mf_emulator::warp_barrier();
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}
