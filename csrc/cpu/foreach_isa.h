// Compiles the kernels of one operator once per instruction set, from one file and with no compiler flags.
//
// An operator's file begins with
//     #define MF_OPERATOR_FILE "cpu/<op>.cpp"
//     #include "cpu/foreach_isa.h"
//     #ifdef MF_ISA
//     ... kernels, in namespace mf::MF_ISA ...
//     #else
//     ... boundary to the dispatcher, compiled once ...
//     #endif
// This header includes that file back once per instruction set with MF_ISA defined to its namespace and MF_ISA_BYTES
// to its vector width, under the compiler's target pragma. Everything from the standard library must have been
// included before, so that no shared inline function is ever compiled for a CPU that may not be there.
#ifndef MF_ISA

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "common/math.h"
#include "cpu/boundary.h"
#include "cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MF_ISA baseline
#define MF_ISA_BYTES 16
#define MF_ISA_REGISTERS 16
#include MF_OPERATOR_FILE
#undef MF_ISA
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define MF_ISA avx2
#define MF_ISA_BYTES 32
#define MF_ISA_REGISTERS 16
#define MF_ISA_AVX2
#include MF_OPERATOR_FILE
#undef MF_ISA
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS
#undef MF_ISA_AVX2
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
#endif
#define MF_ISA avx512
#define MF_ISA_BYTES 64
#define MF_ISA_REGISTERS 32
#define MF_ISA_AVX512
#include MF_OPERATOR_FILE
#undef MF_ISA
#undef MF_ISA_BYTES
#undef MF_ISA_REGISTERS
#undef MF_ISA_AVX512
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#endif  // MF_ISA
