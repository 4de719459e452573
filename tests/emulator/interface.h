// The kernels' launchers as C functions for ctypes; pointers to host memory, dtypes by number.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#define MF_EXPORT extern "C" __attribute__((visibility("default")))

namespace mf_emulator {

// What a launcher asks its scratch memory from: NaN before it is written, freed when the call is over
class Memory {
 public:
  float* operator()(int64_t floats) const {
    kept_.push_back(std::make_unique<float[]>(floats));
    std::fill_n(kept_.back().get(), floats, NAN);
    return kept_.back().get();
  }

 private:
  mutable std::vector<std::unique_ptr<float[]>> kept_;
};

// Calls f.template operator()<T>(); 0 float32, 1 float16, 2 bfloat16
template <class F>
void with_dtype(int dtype, const F& f) {
  if (dtype == 0) f.template operator()<float>();
#ifndef MF_FLOAT_ONLY
  if (dtype == 1) f.template operator()<__half>();
  if (dtype == 2) f.template operator()<__nv_bfloat16>();
#endif
}

template <class T>
T* as(void* pointer) {
  return static_cast<T*>(pointer);
}
template <class T>
const T* as(const void* pointer) {
  return static_cast<const T*>(pointer);
}

}  // namespace mf_emulator
