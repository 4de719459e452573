#include "cuda/report.h"

#include "common/interface.h"

#include <atomic>
#include <cstdint>
#include <string>

namespace mf {
namespace {

constexpr const char* KERNEL_NAMES[KERNEL_COUNT] = {
    "mobile_to_former_fwd", "mobile_to_former_bwd", "former_to_mobile_fwd", "former_to_mobile_bwd",
    "dynamic_relu_fwd",     "dynamic_relu_bwd",     "depthwise_conv2d_fwd", "depthwise_conv2d_bwd",
};

std::atomic<uint64_t> calls[KERNEL_COUNT];

// nvcc lists the targets of a compilation as __CUDA_ARCH_LIST__, 800,900 for sm_80 and sm_90
constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};

void append(std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; }

}  // namespace

void count_served(Kernel kernel) { calls[static_cast<int>(kernel)].fetch_add(1, std::memory_order_relaxed); }

}  // namespace mf

// Looked for in the file before it is loaded
extern "C" {
extern __attribute__((visibility("default"))) const char mf_kernels_cuda_interface[];
const char mf_kernels_cuda_interface[] = "mf_kernels _cuda interface " MF_INTERFACE_TEXT(MF_INTERFACE) ".";
}

// {"calls": {"dynamic_relu_fwd:native:cuda": 3}, "architectures": ["sm_80", "sm_90"]} as JSON.
// The text stays valid until the same thread asks again.
extern "C" __attribute__((visibility("default"))) const char* mf_kernels_cuda_report() {
  using namespace mf;
  static thread_local std::string text;
  std::string served, architectures;
  for (int k = 0; k < KERNEL_COUNT; ++k) {
    const uint64_t n = calls[k].load(std::memory_order_relaxed);
    if (n > 0) append(served, std::string("\"") + KERNEL_NAMES[k] + ":native:cuda\": " + std::to_string(n));
  }
  for (const int architecture : ARCHITECTURES)
    append(architectures, "\"sm_" + std::to_string(architecture / 10) + "\"");
  text = "{\"calls\": {" + served + "}, \"architectures\": [" + architectures + "]}";
  return text.c_str();
}
