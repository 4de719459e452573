#include "interface.h"
#include "cuda/depthwise_conv2d_kernels.cuh"

using namespace mf_emulator;

MF_EXPORT void mf_depthwise_conv2d(int dtype, void* y, const void* x, const void* weight, const void* bias, int64_t B,
                                   int64_t C, int64_t H, int64_t W, int64_t O, int64_t K, int64_t stride,
                                   int64_t activation, bool channels_last) {
  const auto shape = mf::depthwise_shape(B, C, H, W, O, K, stride, channels_last);
  with_dtype(dtype, [&]<class T>() {
    mf::launch_depthwise_conv2d<T>(as<T>(y), as<T>(x), as<T>(weight), as<T>(bias), shape, mf::Activation(activation),
                                   nullptr);
  });
}

MF_EXPORT void mf_depthwise_conv2d_backward(int dtype, void* d_x, void* d_weight, void* d_bias, const void* d_y,
                                            const void* x, const void* weight, const void* bias, int64_t B, int64_t C,
                                            int64_t H, int64_t W, int64_t O, int64_t K, int64_t stride,
                                            int64_t activation, bool channels_last) {
  const auto shape = mf::depthwise_shape(B, C, H, W, O, K, stride, channels_last);
  with_dtype(dtype, [&]<class T>() {
    std::vector<T> gradient(activation == 0 ? 0 : B * O * shape.OH * shape.OW);
    mf::launch_depthwise_conv2d_backward<T>(as<T>(d_x), as<T>(d_weight), as<T>(d_bias), as<T>(d_y), as<T>(x),
                                            as<T>(weight), as<T>(bias), gradient.data(), shape,
                                            mf::Activation(activation), Memory(), nullptr);
  });
}
