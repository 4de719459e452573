// Between the dispatcher's tensors and the CUDA kernels' pointers: device, stream, dtypes, scratch memory, launch checks.
#pragma once

#include "common/counter.h"
#include "tensor/check.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tuple>
#include <vector>

namespace mf {

// The arguments of an operator whose first one is a feature map; checks that one
inline Arguments check_map(const char* op, const char* name, const Tensor& x) {
  const Arguments arguments(op, name, x, {aoti_torch_device_type_cuda(), 0},
                            {ScalarType::Float, ScalarType::Half, ScalarType::BFloat16});
  arguments.feature_map(name, x);
  return arguments;
}

// One call on the device of `x`, on torch's current stream. Nothing here waits for the device and all memory is torch's,
// so a call can be captured in a CUDA graph.
class DeviceCall {
 public:
  DeviceCall(KernelCounter& kernel, const Tensor& x)
      : place_{aoti_torch_device_type_cuda(), x.get_device_index()}, guard_(place_.device_index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place_.device_index, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    kernel.add();  // on the host; the device counts nothing
  }

  cudaStream_t stream() const { return stream_; }
  FeatureMap new_map(const FeatureMap& like, int64_t channels, int64_t height, int64_t width) const {
    return mf::new_map(like, channels, height, width, place_);
  }
  Tensor new_tensor(std::initializer_list<int64_t> sizes, torch::headeronly::ScalarType dtype) const {
    return mf::new_tensor(sizes, dtype, place_);
  }
  // Scratch memory that lives as long as the call; torch's allocator orders its next use after this stream's work
  float* operator()(int64_t floats) const {
    scratch_.push_back(new_tensor({floats}, torch::headeronly::ScalarType::Float));
    return static_cast<float*>(scratch_.back().data_ptr());
  }
  // To be called once, after the last launch: the error of any of them
  void check_launches() const { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

 private:
  Place place_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  mutable std::vector<Tensor> scratch_;
};

// Calls f.template operator()<T>() with the CUDA type of a dtype that the kernels are written for.
template <class F>
void with_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float: return f.template operator()<float>();
#ifndef MF_FLOAT_ONLY  // by tests, for a third of the time that the compiler takes
    case torch::headeronly::ScalarType::Half: return f.template operator()<__half>();
    case torch::headeronly::ScalarType::BFloat16: return f.template operator()<__nv_bfloat16>();
#endif
    default: STD_TORCH_CHECK(false, "mf_kernels on CUDA: expected float32, float16 or bfloat16");
  }
}

}  // namespace mf
