// Compiles one file once per instruction set, with no compiler flags. Such a file begins with
//     #define MF_EACH_SET_FILE "cpu/<op>.cpp"
//     #include ...  all that it needs and that is compiled once
//     #include "common/each_set.h"
//     #ifdef MF_ISA
//     ... kernels, in namespace MF_ISA ...
//     #else
//     ... what is compiled once ...
//     #endif
// This header includes that file back once per instruction set, under the compiler's target pragma. Everything from the
// standard library must have been included before, so that no shared inline function is ever compiled for a CPU that may
// not be there. Two more sets, with instructions for bfloat16, follow where MF_EACH_SET_BFLOAT16 is defined.
//
// MF_ISA            the set's namespace
// MF_ISA_BYTES      of a vector
// MF_ISA_REGISTERS  that hold vectors
// MF_ISA_AVX2, MF_ISA_AVX512, MF_ISA_PAIRS, MF_ISA_TILES   which intrinsics there are, the last two for bfloat16
// MF_ISA_REST       the set whose kernels serve in this one where bfloat16 plays no part
#ifndef MF_ISA

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/isa.h"
#include "common/math.h"
#include "common/numbers.h"
#if !defined(MF_BASELINE_ONLY)
#include <immintrin.h>
#endif

#define MF_ISA baseline
#define MF_ISA_BYTES 16
#define MF_ISA_REGISTERS 16
#include MF_EACH_SET_FILE
#undef MF_ISA
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS

#if !defined(MF_BASELINE_ONLY)

// prefer-vector-width is GCC's: without it the compiler splits vectors of 64 bytes
#define MF_TARGET_TEXT(...) #__VA_ARGS__
#if defined(__clang__)
#define MF_TARGET(features) \
  _Pragma(MF_TARGET_TEXT(clang attribute push(__attribute__((target(features))), apply_to = function)))
#define MF_END_TARGET _Pragma("clang attribute pop")
#define MF_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#else
#define MF_TARGET(features) _Pragma("GCC push_options") _Pragma(MF_TARGET_TEXT(GCC target(features)))
#define MF_END_TARGET _Pragma("GCC pop_options")
#define MF_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512"
#endif

#define MF_ISA avx2
#define MF_ISA_BYTES 32
#define MF_ISA_REGISTERS 16
#define MF_ISA_AVX2
MF_TARGET("avx2,fma")
#include MF_EACH_SET_FILE
MF_END_TARGET
#undef MF_ISA
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS
#undef MF_ISA_AVX2

#define MF_ISA_BYTES 64
#define MF_ISA_REGISTERS 32
#define MF_ISA_AVX512

#define MF_ISA avx512
MF_TARGET(MF_AVX512_FEATURES)
#include MF_EACH_SET_FILE
MF_END_TARGET
#undef MF_ISA

#if defined(MF_EACH_SET_BFLOAT16)
#define MF_ISA_REST avx512

#define MF_ISA avx512bf16
#define MF_ISA_PAIRS
MF_TARGET("avx512bf16," MF_AVX512_FEATURES)
#include MF_EACH_SET_FILE
MF_END_TARGET
#undef MF_ISA

#define MF_ISA amx
#define MF_ISA_TILES
MF_TARGET("amx-tile,amx-bf16,avx512bf16," MF_AVX512_FEATURES)
#include MF_EACH_SET_FILE
MF_END_TARGET
#undef MF_ISA
#undef MF_ISA_TILES
#undef MF_ISA_PAIRS

#undef MF_ISA_REST
#endif  // MF_EACH_SET_BFLOAT16

#undef MF_ISA_AVX512
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS

#endif  // !MF_BASELINE_ONLY
#endif  // MF_ISA
