#include "interface.h"
#include "cuda/former_to_mobile_kernels.cuh"

using namespace mf_emulator;

MF_EXPORT void mf_former_to_mobile(int dtype, void* y, const void* x, const void* k, const void* v, int64_t B,
                                   int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  with_dtype(dtype, [&]<class T>() {
    mf::launch_former_to_mobile<T>(as<T>(y), as<T>(x), as<T>(k), as<T>(v), shape, nullptr);
  });
}

MF_EXPORT void mf_former_to_mobile_backward(int dtype, void* d_x, void* d_k, void* d_v, const void* d_y, const void* x,
                                            const void* k, const void* v, int64_t B, int64_t C, int64_t L, int64_t M,
                                            int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  with_dtype(dtype, [&]<class T>() {
    mf::launch_former_to_mobile_backward<T>(as<T>(d_x), as<T>(d_k), as<T>(d_v), as<T>(d_y), as<T>(x), as<T>(k),
                                            as<T>(v), shape, Memory(), nullptr);
  });
}
