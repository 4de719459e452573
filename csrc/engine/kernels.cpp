// The kernels of every instruction set, and the table of each. Compiled once per set.
#define MF_EACH_SET_FILE "engine/kernels.cpp"
#define MF_EACH_SET_BFLOAT16
#include "engine/kernels.h"
#include "common/each_set.h"

#ifdef MF_ISA

#include "common/vector.isa.h"

#include "common/tokens.isa.h"

#include "engine/vector.isa.h"

#include "engine/tiles.isa.h"

#include "engine/pointwise.isa.h"

#include "engine/depthwise.isa.h"

#include "engine/scores.isa.h"

#include "engine/attention.isa.h"

#include "engine/stem.isa.h"

#include "engine/tokens.isa.h"

namespace mf::engine::MF_ISA {

// Where bfloat16 plays no part, one set may take the kernels of another.
#if defined(MF_ISA_REST)
namespace rest = MF_ISA_REST;
#else
namespace rest = MF_ISA;
#endif

#define MF_NAME_TEXT(name) #name
#define MF_NAME(name) MF_NAME_TEXT(name)

extern const Kernels KERNELS = {
    MF_NAME(MF_ISA),
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

}  // namespace mf::engine::MF_ISA

#else

namespace mf::engine {
namespace {

const Kernels* const ALL[] = {
    &baseline::KERNELS,
#if !defined(MF_BASELINE_ONLY)
    &avx2::KERNELS,     &avx512::KERNELS, &avx512bf16::KERNELS, &amx::KERNELS,
#endif
};  // in the order of Isa

}  // namespace

std::vector<const Kernels*> compiled() { return {std::begin(ALL), std::end(ALL)}; }

std::vector<const Kernels*> runnable() {
  std::vector<const Kernels*> able;
  int isa = 0;
  for (const Kernels* kernels : ALL) {
    if (mf::runnable(Isa(isa++))) able.push_back(kernels);
  }
  return able;
}

}  // namespace mf::engine

#endif
