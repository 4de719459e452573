// Compiles engine/kernels.cpp once per instruction set, from one file and with no compiler flags: the file includes
// this header, which includes the file back with MF_LEVEL defined to a namespace and MF_LEVEL_BYTES to the width of
// its vectors, under the compiler's target pragma. Everything from the standard library must have been included
// before, so that no shared inline function is ever compiled for a CPU that may not be there.
#ifndef MF_LEVEL

#include "engine/kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#define MF_LEVEL baseline
#define MF_LEVEL_BYTES 16
#define MF_LEVEL_REGISTERS 16
#include "engine/kernels.cpp"
#undef MF_LEVEL
#undef MF_LEVEL_BYTES
#undef MF_LEVEL_REGISTERS

#if defined(__x86_64__) && !defined(MF_BASELINE_ONLY)  // which is for tests that compile often

#if defined(__clang__)
#define MF_TARGET(features) \
  _Pragma(MF_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define MF_TEXT(...) #__VA_ARGS__
#define MF_END_TARGET _Pragma("clang attribute pop")
#else
#define MF_TARGET(features) _Pragma("GCC push_options") _Pragma(MF_TEXT(GCC target(features)))
#define MF_TEXT(...) #__VA_ARGS__
#define MF_END_TARGET _Pragma("GCC pop_options")
#endif

#define MF_LEVEL avx2
#define MF_LEVEL_BYTES 32
#define MF_LEVEL_REGISTERS 16
MF_TARGET("avx2,fma")
#include "engine/kernels.cpp"
MF_END_TARGET
#undef MF_LEVEL
#undef MF_LEVEL_BYTES
#undef MF_LEVEL_REGISTERS

// prefer-vector-width is GCC's: without it the compiler splits vectors of 64 bytes
#if defined(__clang__)
#define MF_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define MF_AVX512BF16_FEATURES "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define MF_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#define MF_AVX512BF16_FEATURES "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif
#define MF_AMX_FEATURES "amx-tile,amx-bf16," MF_AVX512BF16_FEATURES
#define MF_LEVEL_AVX512
#define MF_LEVEL_BYTES 64
#define MF_LEVEL_REGISTERS 32

#define MF_LEVEL avx512
MF_TARGET(MF_AVX512_FEATURES)
#include "engine/kernels.cpp"
MF_END_TARGET
#undef MF_LEVEL

// whose kernels serve what bfloat16 plays no part in: products of floats write no bfloat16 map for tiles, because in a
// network that has such maps no pointwise layer is of floats (Builder::maps)
#define MF_LEVEL_REST avx512

#define MF_LEVEL avx512bf16
#define MF_LEVEL_PAIRS
MF_TARGET(MF_AVX512BF16_FEATURES)
#include "engine/kernels.cpp"
MF_END_TARGET
#undef MF_LEVEL

#define MF_LEVEL amx
#define MF_LEVEL_TILES
MF_TARGET(MF_AMX_FEATURES)
#include "engine/kernels.cpp"
MF_END_TARGET
#undef MF_LEVEL
#undef MF_LEVEL_TILES
#undef MF_LEVEL_PAIRS

#undef MF_LEVEL_REST
#undef MF_LEVEL_AVX512
#undef MF_LEVEL_BYTES
#undef MF_LEVEL_REGISTERS

#endif  // __x86_64__ && !MF_BASELINE_ONLY
#endif  // MF_LEVEL
