// The instruction sets that kernels for the CPU are compiled for, and which of them this CPU has.
#pragma once

// The baseline alone where we know no other platform, and for tests that compile often
#if !defined(__x86_64__) && !defined(MF_BASELINE_ONLY)
#define MF_BASELINE_ONLY
#endif

#if !defined(MF_BASELINE_ONLY)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace mf {

enum class Isa : int { baseline, avx2, avx512, avx512bf16, amx };  // each has what the ones before it have
constexpr const char* ISA_NAMES[] = {"baseline", "avx2", "avx512", "avx512bf16", "amx"};

#if !defined(MF_BASELINE_ONLY)
// Whether the CPU has tiles and their bfloat16 products, and the system lets this process use them: it has to be asked,
// since it then keeps eight kilobytes more of every thread.
inline bool has_tiles() {
#if defined(__linux__)
  constexpr unsigned BF16 = 1u << 22, TILE = 1u << 24;  // of edx
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;      // ARCH_REQ_XCOMP_PERM
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx & BF16) && (edx & TILE) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#else
  return false;
#endif
}
#endif

// Whether this CPU runs code that was compiled for the set
inline bool runnable(Isa isa) {
#if !defined(MF_BASELINE_ONLY)
  switch (isa) {
    case Isa::baseline: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    case Isa::avx512bf16: return runnable(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
    default: {
      if (!runnable(Isa::avx512bf16)) return false;
      static const bool tiles = has_tiles();
      return tiles;
    }
  }
#else
  return isa == Isa::baseline;
#endif
}

}  // namespace mf
