// What the network asks of an instruction set: one table of functions, filled once per set from kernels.cpp.
//
// Legend: P positions of a map, row by row; C K N channels; M tokens, up to MAX_TOKENS. Channels lie in blocks of 16, and a block is
// P groups of 16 floats, so a map is [blocks][P][16] and one position of one block is one or more whole vectors.
// A map may have a border of zeros one position wide; pointers then point at the first position inside.
// What fills up the last block is zero.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/math.h"

namespace mf::engine {

constexpr int BLOCK = 16;        // channels of a block
constexpr int BRIDGE_HEADS = 2;  // of both bridges
constexpr int FORMER_HEADS = 4;  // of the attention among tokens

enum class Act { identity, relu6, relu, hardswish, gelu, hard_sigmoid, dynamic_relu };

// How the products of a layer are taken.
enum class Format {
  f32,         // float map, float weight
  bf16,        // bfloat16 map and weight, or high and low parts of both; `bf16_step` inputs at a time
  i16_weight,  // float map, weight of 16-bit integers and a factor: where a layer is as slow as its weight arrives
};

// A map as bfloat16, without border, [parts][runs][P][Kernels::bf16_run]. One part is the map rounded; of two, the high
// part is that, and the low one what rounding took away, so that they add up to the map.
struct Bfloat16Map {
  uint16_t* data = nullptr;  // position 0 of the first channel, or null
  int parts = 1;
  ptrdiff_t part_size = 0;  // elements between parts
  ptrdiff_t run = 0;        // and between runs of channels
};

// Weights that will be read soon, to be prefetched while arithmetic leaves the memory idle: one cache line every `step`
// bytes of [at, end).
struct Prefetch {
  const char* at = nullptr;
  const char* end = nullptr;
  ptrdiff_t step = 64;
};

// One group of a pointwise layer, ready for one instruction set. Its weight is
// f32, i16_weight: [panel][depth][vectors of the panel]
// bf16: [panel][depth][vectors][2], pairs of inputs; with tiles [panel][depth][parts][vectors][16][lanes][2]
struct Products {
  Format format = Format::f32;
  int depth = 0;                     // inputs, or steps of `bf16_step` inputs
  const int32_t* offsets = nullptr;  // [depth] where an input lies relative to a position, in elements
  const void* weight = nullptr;
  const float* scale = nullptr;  // i16_weight: [vectors] of the sums
  int rows = 0;                  // of each image, which share no tile with another's; 0: all are of one image
  int parts = 1;                 // bf16: of map and weight
  ptrdiff_t part_size = 0;       // elements between those of the map
  int vectors = 0;               // of outputs, in vectors of the instruction set
  bool half_tail = false;        // of the last block, only the lower half is outputs
  Prefetch* prefetch = nullptr;  // moved on by what was prefetched, or null
};

// What happens to the sums of a layer. All channel vectors begin at the group's first output.
struct Epilogue {
  const float* bias = nullptr;    // [16 blocks], or null
  const float* slope1 = nullptr;  // dynamic_relu: max(slope1 y, slope2 y)
  const float* slope2 = nullptr;
  Act act = Act::identity;
  int width = 1;                    // position p is column p % width of row p / width
  const float* residual = nullptr;  // added last, or null
  ptrdiff_t residual_block = 0;     // floats between its blocks
  ptrdiff_t residual_row = 0;       // floats between its rows
  float* out = nullptr;             // or null
  ptrdiff_t out_block = 0;
  ptrdiff_t out_row = 0;
  Bfloat16Map bf16;  // the same as bfloat16, or null
};

// A row of the first convolution's output: relu6(3 x 3 of stride 2 + bias).
struct Stem {
  const float* rows[3] = {};      // each [channels][2][half]: even and odd columns, see split_row
  ptrdiff_t half = 0;             // floats
  int channels = 0, outputs = 0;  // outputs: a multiple of 4
  const float* weight = nullptr;  // [outputs / lanes][channels][3][3][lanes], the last ones fewer
  const float* bias = nullptr;    // [outputs]
};

struct Depthwise {
  const float* in = nullptr;  // one block, with border; first input position of output (0, 0)'s window centre
  ptrdiff_t in_row = 0;       // floats
  int stride = 1;
  int width = 0;                  // of the output
  const float* weight = nullptr;  // [9][16]
  const float* bias = nullptr;    // [16]
  const float* slope1 = nullptr;
  const float* slope2 = nullptr;
  Act act = Act::identity;
  float* out = nullptr;  // one block without border, or null
  Bfloat16Map bf16;      // all blocks, or null
  int bf16_block = 0;    // which of them is this one
  Prefetch* prefetch = nullptr;
};

// The positions of a map as the attentions walk them: `rows` runs of `width` positions.
struct Walk {
  const float* x = nullptr;
  ptrdiff_t block = 0;  // floats between blocks
  ptrdiff_t row = 0;    // floats between rows
  int width = 0;
  int rows = 0;
};

struct Kernels {
  const char* name;
  int lanes;      // floats of a vector
  int bf16_run;   // channels of a bfloat16 map that lie together
  int bf16_step;  // of them, how many a product takes at a time
  // positions [begin, end) of panels [first, last) of one group; `a` is position 0, `stride` elements from one to the
  // next: for bf16 always bf16_run
  void (*pointwise)(const Products&, const Epilogue&, const void* a, ptrdiff_t stride, int begin, int end, int first,
                    int last);
  void (*split_row)(const float* row, int width, float* even, float* odd);
  void (*stem)(const Stem&, int width, float* out, ptrdiff_t out_block);
  void (*depthwise)(const Depthwise&, int first_row, int last_row);
  // Mobile-to-Former over some rows, queries [C][8] by token: the reference and the sum of the softmax [16] by head
  // and token, untouched where there are no rows, and under them the weighted sums of x [blocks][M][16]; `kept`
  // [positions][16] are the scores, or null
  void (*mobile_to_former)(const Walk&, const float* queries, int C, int M, float* reference, float* sum, float* sums,
                           float* kept);
  // Former-to-Mobile, keys [C][8] by token: x += the values [blocks][M][16], weighted
  void (*former_to_mobile)(const Walk&, const float* keys, const float* values, int C, int M, float* out,
                           const Bfloat16Map&);
  void (*layer_norm)(float* x, const float* weight, const float* bias, int D, int rows);  // x [rows][D]
  // the attention of `rows` queries over the tokens [M][D]; q, out [rows][D]
  void (*former_attention)(const float* q, const float* tokens, float* out, int D, int M, int rows);
  // x [rows][16] of one block: max(s1 x, s2 x), s = the mix [positions][8] of the tokens' slopes [2][M][16]
  void (*spatial_relu)(float* x, ptrdiff_t row, int width, int rows, const float* mix, const float* slopes, int M);
  void (*to_bf16_map)(const float* x, int positions, const Bfloat16Map&,
                      int block);                           // x: one block, from the map's first position
  void (*mean)(const float* x, int positions, float* out);  // one block: [positions][16] -> hardswish of the mean [16]
};

// How a layer's vectors of outputs are dealt into panels of three: 3 3 3, 3 3 2, or 3 2 2 rather than 3 3 1.
constexpr int panel_count(int vectors) { return (vectors + 2) / 3; }
constexpr int first_vector(int vectors, int panel) {
  const bool two_twos = vectors % 3 == 1 && vectors > 1 && panel == panel_count(vectors) - 1;
  return 3 * panel - (two_twos ? 1 : 0);
}
constexpr int panel_vectors(int vectors, int panel) {
  const int next = panel + 1 < panel_count(vectors) ? first_vector(vectors, panel + 1) : vectors;
  return next - first_vector(vectors, panel);
}

// The instruction sets that were compiled, and those of them that this CPU runs; the best one last.
std::vector<const Kernels*> compiled();
std::vector<const Kernels*> runnable();

}  // namespace mf::engine
