// How many blocks a call launches, as C functions for ctypes: the plans are functions of shapes and need no device.
#include "interface.h"
#include "cuda/attention.cuh"
#include "cuda/depthwise_tiles.cuh"
#include "cuda/dynamic_relu_kernels.cuh"
#include "cuda/spatial_dynamic_relu_kernels.cuh"

// `bytes` of a value; backward passes of sums take loads of at most 4 values, as their launchers do
MF_EXPORT int64_t mf_blocks_of_attention(int bytes, int64_t B, int64_t C, int64_t L, int64_t M, int64_t N,
                                         bool channels_last, bool backward) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  return mf::plan_attention(shape, {bytes, true}, backward ? 4 : 16 / bytes).blocks;
}

MF_EXPORT int64_t mf_blocks_of_dynamic_relu(int bytes, int64_t B, int64_t C, int64_t L, bool channels_last,
                                            bool backward) {
  return mf::plan_dynamic_relu(B, C, L, {bytes, true}, channels_last, backward).blocks;
}

MF_EXPORT int64_t mf_blocks_of_spatial_dynamic_relu(int bytes, int64_t B, int64_t C, int64_t L, int64_t M,
                                                    bool channels_last, bool) {
  return mf::plan_spatial_dynamic_relu(B, C, L, M, {bytes, true}, channels_last).p.blocks;
}

MF_EXPORT int64_t mf_blocks_of_depthwise(int bytes, int64_t B, int64_t C, int64_t H, int64_t W, int64_t O, int64_t K,
                                         int64_t S, bool channels_last, bool backward) {
  const auto shape = mf::depthwise_shape(B, C, H, W, O, K, S, channels_last);
  return mf::plan_depthwise(shape, {bytes, true}, backward ? 4 : 16 / bytes, backward).blocks;
}
