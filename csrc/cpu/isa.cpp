#include "cpu/isa.h"

#include <atomic>
#include <cstring>
#include <string>

#include "common/interface.h"

namespace mf {
namespace {

Isa best() { return runnable(Isa::avx512) ? Isa::avx512 : runnable(Isa::avx2) ? Isa::avx2 : Isa::baseline; }

// -1 where the name is unknown or the CPU lacks it
int find(const char* name) {
  for (int i = 0; i < ISA_COUNT; ++i) {
    if (std::strcmp(name, ISA_NAMES[i]) == 0 && runnable(static_cast<Isa>(i))) return i;
  }
  return -1;
}

std::atomic<int>& chosen() {
  static std::atomic<int> value{static_cast<int>(best())};
  return value;
}

}  // namespace

Isa isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

void count_served(KernelCounter& kernel) { kernel.add(static_cast<int>(isa())); }

}  // namespace mf

#define MF_EXPORT extern "C" __attribute__((visibility("default")))

// Looked for in the file before it is loaded
extern "C" {
extern __attribute__((visibility("default"))) const char mf_kernels_cpu_interface[];
const char mf_kernels_cpu_interface[] = "mf_kernels _cpu interface " MF_INTERFACE_TEXT(MF_INTERFACE) ".";
}

// 0 when the instruction set of that name serves from now on, 1 when it cannot.
MF_EXPORT int mf_kernels_cpu_set_isa(const char* name) {
  const int found = mf::find(name);
  if (found < 0) return 1;
  mf::chosen().store(found, std::memory_order_relaxed);
  return 0;
}

// {"isa": "avx512", "compiled": [...], "runnable": [...], "calls": {"dynamic_relu_fwd:native:cpu:avx512": 3}} as JSON.
// The text stays valid until the same thread asks again.
MF_EXPORT const char* mf_kernels_cpu_report() {
  using namespace mf;
  static thread_local std::string text;
  const std::vector<const KernelCounter*> kernels = KernelCounter::all();
  std::string compiled, able, served;
  const auto append = [](std::string& list, const std::string& item) { list += (list.empty() ? "" : ", ") + item; };
  for (int i = 0; i < ISA_COUNT; ++i) {
    const std::string name = std::string("\"") + ISA_NAMES[i] + "\"";
#if defined(MF_BASELINE_ONLY)
    if (i > 0) break;
#endif
    append(compiled, name);
    if (runnable(static_cast<Isa>(i))) append(able, name);
    for (const KernelCounter* kernel : kernels) {
      if (const uint64_t n = kernel->calls(i); n > 0) {
        append(served, std::string("\"") + kernel->name + ":native:cpu:" + ISA_NAMES[i] + "\": " + std::to_string(n));
      }
    }
  }
  text = std::string("{\"isa\": \"") + ISA_NAMES[static_cast<int>(isa())] + "\", \"compiled\": [" + compiled +
         "], \"runnable\": [" + able + "], \"calls\": {" + served + "}}";
  return text.c_str();
}
