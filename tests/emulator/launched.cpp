// Which kernels ran, for ctypes: so that a test cannot pass by another one.
#include <dlfcn.h>

#include <string>

#include "interface.h"

// Writes the mangled names of what was launched since the last call, one a line, and forgets them
MF_EXPORT void mf_launched(char* names, int64_t size) {
  std::string all;
  for (const void* kernel : mf_emulator::launched) {
    Dl_info info;
    if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) std::abort();
    all += std::string(info.dli_sname) + "\n";
  }
  mf_emulator::launched.clear();
  if (int64_t(all.size()) >= size) std::abort();
  std::memcpy(names, all.c_str(), all.size() + 1);
}

// From now on kernels are told and not run, or run again
MF_EXPORT void mf_only_tell(bool on) { mf_emulator::only_told = on; }
