// Everything that a few images of one size need beside the weights: planned and allocated once per size.
#pragma once

#include <algorithm>

#include "engine/weights.h"

namespace mf::engine {

// A map in storage: [blocks][rows][columns][16], with a border of zeros or without.
struct Map {
  float* data = nullptr;  // the first position inside
  int channels = 0, height = 0, width = 0, blocks = 0;
  ptrdiff_t row = 0, block = 0;  // floats
  Bfloat16Map bf16;              // the same as bfloat16, or null

  int positions() const { return height * width; }
};

// Offsets of the inputs of each group of a pointwise layer, for a map of one size.
using Offsets = std::vector<std::vector<int32_t>>;

Map make_map(Arena&, int channels, int height, int width, bool border);

// Where a layer's inputs lie in a map whose blocks, or runs of bfloat16, are `block` elements apart
Offsets offsets_of(const Pointwise&, ptrdiff_t block, const Kernels&);

// A map of `blocks` blocks as bfloat16 at `data`; it takes bf16_size elements.
inline Bfloat16Map bf16_map(uint16_t* data, int parts, int blocks, int positions, const Kernels& kernels) {
  const int runs = (blocks * BLOCK + kernels.bf16_run - 1) / kernels.bf16_run;
  const ptrdiff_t run = ptrdiff_t(positions) * kernels.bf16_run;
  return {data, parts, runs * run, run};
}
inline size_t bf16_size(const Bfloat16Map& bf16) { return size_t(bf16.parts) * bf16.part_size; }

// What a block needs for the image at work
struct BlockSpace {
  Map middle;                // down: the squeezed map, with border
  float* queries = nullptr;  // [C][8]
  Offsets expand, squeeze, project;
  int height = 0, width = 0;  // of the output
};

// What a block leaves of an image
struct BlockResult {
  Map out;
  float* keys = nullptr;    // [C'][8]
  float* values = nullptr;  // [blocks of C'][M][16]
};

// Images that pass a block's tokens together, so that its weights are read once for all of them.
constexpr int TOGETHER = 8;

constexpr int GROUPED_CHUNK = 112;  // positions that a grouped layer makes before they are put in order

// What the members of a team each need for themselves.
struct Scratch {
  std::vector<float*> panel;    // per block: [3][(H + 2)(W + 2)][16], its border zero
  float* image_row = nullptr;   // [W], of bytes that became floats
  float* image_rows = nullptr;  // [3][channels][2][half]: rows r, r + 1, r + 2 at r % 3, as the stem reads them
  float* grouped = nullptr;     // [blocks][112][16] as a grouped layer makes them, group by group
  float* plane = nullptr;       // [positions][16], with spatial dynamic ReLU in bfloat16
};

// Mobile-to-Former over a span of positions. Spans depend on the size of the map alone, so that sums do not depend on
// the number of threads.
struct Span {
  float* reference = nullptr;  // [16] of the softmax: a running maximum, or little less
  float* total = nullptr;      // [16] of its powers, relative to that
  float* sums = nullptr;       // [blocks][M][16]
};

constexpr int SPAN_POSITIONS = 392;
constexpr int MAX_SPANS = 8;

inline int spans_of(int positions) { return std::clamp(positions / SPAN_POSITIONS, 1, MAX_SPANS); }

struct Workspace {
  // `last_parts` of bfloat16 that the reader of the last map takes; 0 for floats, or where nobody reads it
  Workspace(const Config&, const Weights&, const Kernels&, int height, int width, int threads, int images,
            int last_parts);

  int height, width, images;
  // The first block that takes images together; those before take one after the other, since while maps are larger than
  // weights it is the maps that had better stay in the cache.
  size_t first_together;
  Arena arena;
  Map stem;
  std::vector<BlockSpace> blocks;
  // [images][blocks]; shared by all images where the next block takes one after the other
  std::vector<std::vector<BlockResult>> results;
  float* flat;  // any depthwise output: float or bfloat16
  std::vector<Scratch> scratch;
  Span spans[MAX_SPANS];

  // [images][M] tokens: rows of D, and of what the linear layers make of them
  float *tokens, *query_gate, *gathered, *row, *wide, *slopes[2], *reduced, *key_value;
  float* bridge_queries;  // of the last bridge, [C][8]
  std::vector<int32_t> in_order;
  ptrdiff_t image_half = 0;  // floats of half an image row, with what a vector reads beyond
  float* scores = nullptr;   // spatial: [positions][16]
  float* mix = nullptr;      // spatial: [positions][8]
};

}  // namespace mf::engine
