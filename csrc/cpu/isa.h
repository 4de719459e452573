// Which instruction set serves, chosen once at run time, and how often each kernel ran.
#pragma once

#include "common/counter.h"
#include "common/isa.h"

namespace mf {

constexpr int ISA_COUNT = KernelCounter::WAYS;  // that the kernels here are compiled for, or the baseline alone

// The best instruction set that was compiled and that this CPU has, or the one that was asked for by
// mf_kernels_cpu_set_isa (which is how MF_KERNELS_ISA comes in).
Isa isa();

// Counts one call in the instruction set in use; mf_kernels.record_kernels reads the counts.
void count_served(KernelCounter& kernel);

}  // namespace mf

// Calls a function of the namespace that was compiled for the instruction set in use.
#if !defined(MF_BASELINE_ONLY)
#define MF_CALL(...)                                          \
  switch (::mf::isa()) {                                      \
    case ::mf::Isa::avx512: ::mf::avx512::__VA_ARGS__; break; \
    case ::mf::Isa::avx2: ::mf::avx2::__VA_ARGS__; break;     \
    default: ::mf::baseline::__VA_ARGS__;                     \
  }
#else
#define MF_CALL(...) ::mf::baseline::__VA_ARGS__
#endif
