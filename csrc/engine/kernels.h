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
  bf16,        // bfloat16 map and weight, or a few of each that add up to them; `half_step` inputs at a time
  i16_weight,  // float map, weight of 16-bit integers and a factor: where a layer is as slow as its weight arrives
};

// A map as bfloat16, without border, [pieces][runs][P][Kernels::half_run]: one piece, or two that add up to the map.
struct Half {
  uint16_t* data = nullptr;  // position 0 of the first channel, or null
  int pieces = 1;
  ptrdiff_t piece = 0;  // elements between pieces
  ptrdiff_t run = 0;    // and between runs of channels
};

// Weights that will be read soon, to be asked for while arithmetic leaves the memory idle: one cache line every `step`
// bytes of [at, end).
struct Ahead {
  const char* at = nullptr;
  const char* end = nullptr;
  ptrdiff_t step = 64;
};

// One group of a pointwise layer, ready for one instruction set. Its weight is
// f32, i16_weight: [panel][depth][vectors of the panel]
// bf16: [panel][depth][vectors][2], pairs of inputs; with tiles [panel][depth][pieces][vectors][16][lanes][2]
struct Products {
  Format format = Format::f32;
  int depth = 0;                     // inputs, or steps of `half_step` inputs
  const int32_t* offsets = nullptr;  // [depth] where an input lies relative to a position, in elements
  const void* weight = nullptr;
  const float* scale = nullptr;  // i16_weight: [vectors] of the sums
  int rows = 0;                  // of each image, which share no tile with another's; 0: all are of one image
  int pieces = 1;                // bf16: of map and weight
  ptrdiff_t piece = 0;           // elements between those of the map
  int vectors = 0;               // of outputs, in vectors of the instruction set
  bool half_tail = false;        // of the last block, only the lower half is outputs
  Ahead* ahead = nullptr;        // moved on by what was asked for, or null
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
  Half half;  // the same as bfloat16, or null
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
  Half half;             // all blocks, or null
  int half_block = 0;    // which of them is this one
  Ahead* ahead = nullptr;
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
  int half_run;   // channels of a bfloat16 map that lie together
  int half_step;  // of them, how many a product takes at a time
  // positions [begin, end) of panels [first, last) of one group; `a` is position 0, `stride` elements from one to the
  // next: for bf16 always half_run
  void (*pointwise)(const Products&, const Epilogue&, const void* a, ptrdiff_t stride, int begin, int end, int first,
                    int last);
  void (*split_row)(const float* row, int width, float* even, float* odd);
  void (*stem)(const Stem&, int width, float* out, ptrdiff_t out_block);
  void (*depthwise)(const Depthwise&, int first_row, int last_row);
  // Mobile-to-Former over some rows, queries [C][8] by token: the reference and the sum of the softmax [16] by head
  // and token, untouched where there are no rows, and under them the weighted sums of x [blocks][M][16]; `kept` [positions][16] are the scores, or null
  void (*mobile_to_former)(const Walk&, const float* queries, int C, int M, float* most, float* sum, float* sums,
                           float* kept);
  // Former-to-Mobile, keys [C][8] by token: x += the values [blocks][M][16], weighted
  void (*former_to_mobile)(const Walk&, const float* keys, const float* values, int C, int M, float* out, const Half&);
  void (*layer_norm)(float* x, const float* weight, const float* bias, int D, int rows);  // x [rows][D]
  // the attention of `rows` queries over the tokens [M][D]; q, out [rows][D]
  void (*former_attention)(const float* q, const float* tokens, float* out, int D, int M, int rows);
  // x [rows][16] of one block: max(s1 x, s2 x), s = the mix [positions][8] of the tokens' slopes [2][M][16]
  void (*spatial_relu)(float* x, ptrdiff_t row, int width, int rows, const float* mix, const float* slopes, int M);
  void (*to_half)(const float* x, int positions, const Half&, int block);  // x: one block, from half's first position
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
