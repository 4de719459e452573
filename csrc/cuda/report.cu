// What this library says of itself; read by mf_kernels.record_kernels.
#include "common/counter.h"
#include "common/interface.h"

#include <string>

namespace mf {
namespace {

// nvcc lists the targets of a compilation as __CUDA_ARCH_LIST__, 800,900 for sm_80 and sm_90
constexpr int ARCHITECTURES[] = {__CUDA_ARCH_LIST__};

void append(std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; }

}  // namespace
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
  for (const KernelCounter* kernel : KernelCounter::all()) {
    const uint64_t n = kernel->calls();
    if (n > 0) append(served, std::string("\"") + kernel->name + ":native:cuda\": " + std::to_string(n));
  }
  for (const int architecture : ARCHITECTURES)
    append(architectures, "\"sm_" + std::to_string(architecture / 10) + "\"");
  text = "{\"calls\": {" + served + "}, \"architectures\": [" + architectures + "]}";
  return text.c_str();
}
