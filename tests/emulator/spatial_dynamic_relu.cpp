#include "interface.h"
#include "cuda/spatial_dynamic_relu_kernels.cuh"

using namespace mf_emulator;

MF_EXPORT void mf_spatial_dynamic_relu(int dtype, void* y, const void* x, const void* theta, const void* alpha,
                                       int64_t B, int64_t C, int64_t L, int64_t M, bool channels_last) {
  with_dtype(dtype, [&]<class T>() {
    mf::launch_spatial_dynamic_relu<T>(as<T>(y), as<T>(x), as<T>(theta), as<T>(alpha), B, C, L, M, channels_last,
                                       nullptr);
  });
}

MF_EXPORT void mf_spatial_dynamic_relu_backward(int dtype, void* d_x, void* d_theta, void* d_alpha, const void* d_y,
                                                const void* x, const void* theta, const void* alpha, int64_t B,
                                                int64_t C, int64_t L, int64_t M, bool channels_last) {
  with_dtype(dtype, [&]<class T>() {
    mf::launch_spatial_dynamic_relu_backward<T>(as<T>(d_x), as<T>(d_theta), as<T>(d_alpha), as<T>(d_y), as<T>(x),
                                                as<T>(theta), as<T>(alpha), B, C, L, M, channels_last, Memory(),
                                                nullptr);
  });
}
