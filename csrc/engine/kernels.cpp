// The kernels of every instruction set, and the table of each. Compiled once per set, see engine/levels.h.
#include <utility>

#include "engine/levels.h"

#ifdef MF_LEVEL

#include "engine/vector.h"

#include "engine/tiles.isa.h"

#include "engine/pointwise.isa.h"

#include "engine/depthwise.isa.h"

#include "engine/scores.h"

#include "engine/attention.isa.h"

#include "engine/stem.isa.h"

#include "engine/tokens.isa.h"

namespace mf::engine::MF_LEVEL {

// Where bfloat16 plays no part, one set may take the kernels of another.
#if defined(MF_LEVEL_REST)
namespace rest = MF_LEVEL_REST;
#else
namespace rest = MF_LEVEL;
#endif

#define MF_NAME_TEXT(name) #name
#define MF_NAME(name) MF_NAME_TEXT(name)

extern const Kernels KERNELS = {
    MF_NAME(MF_LEVEL),
    LANES,
    BF16_RUN,
    BF16_STEP,
    pointwise,
    rest::split_row,
    rest::stem,
    depthwise,
    rest::mobile_to_former,
    former_to_mobile,
    rest::layer_norm,
    rest::former_attention,
    rest::spatial_relu,
    to_bf16_map,
    rest::mean,
};

#undef MF_NAME
#undef MF_NAME_TEXT

}  // namespace mf::engine::MF_LEVEL

#else

namespace mf::engine {
namespace {

#if defined(__x86_64__) && !defined(MF_BASELINE_ONLY)
const Kernels* const LEVELS[] = {&baseline::KERNELS, &avx2::KERNELS, &avx512::KERNELS, &avx512bf16::KERNELS,
                                 &amx::KERNELS};

// Whether the CPU has tiles and their bfloat16 products, and the system lets this process use them: it has to be asked,
// since it then keeps eight kilobytes more of every thread.
bool has_tiles() {
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

bool runs(const Kernels* level) {
  if (level == &baseline::KERNELS) return true;
  if (level == &avx2::KERNELS) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (level == &avx512::KERNELS || !avx512) return avx512;
  static const bool tiles = has_tiles();
  return __builtin_cpu_supports("avx512bf16") && (level == &avx512bf16::KERNELS || tiles);
}
#else
const Kernels* const LEVELS[] = {&baseline::KERNELS};

bool runs(const Kernels*) { return true; }
#endif

}  // namespace

std::vector<const Kernels*> compiled() { return {std::begin(LEVELS), std::end(LEVELS)}; }

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> able;
  for (const Kernels* level : LEVELS) {
    if (runs(level)) able.push_back(level);
  }
  return able;
}

}  // namespace mf::engine

#endif
