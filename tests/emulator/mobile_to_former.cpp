#include "interface.h"
#include "cuda/mobile_to_former_kernels.cuh"

using namespace mf_emulator;

MF_EXPORT void mf_mobile_to_former(int dtype, void* out, float* log_sum_exp, const void* x, const void* q, int64_t B,
                                   int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  with_dtype(dtype, [&]<class T>() {
    mf::launch_mobile_to_former<T>(as<T>(out), log_sum_exp, as<T>(x), as<T>(q), shape, Memory(), nullptr);
  });
}

MF_EXPORT void mf_mobile_to_former_backward(int dtype, void* d_x, void* d_q, const void* d_out, const void* x,
                                            const void* q, const void* out, const float* log_sum_exp, int64_t B,
                                            int64_t C, int64_t L, int64_t M, int64_t N, bool channels_last) {
  const auto shape = mf::attention_shape(B, C, L, M, N, channels_last);
  with_dtype(dtype, [&]<class T>() {
    mf::launch_mobile_to_former_backward<T>(as<T>(d_x), as<T>(d_q), as<T>(d_out), as<T>(x), as<T>(q), as<T>(out),
                                            log_sum_exp, shape, Memory(), nullptr);
  });
}
