// Layers of a folded network, packed for one instruction set.
#pragma once

#include "engine/config.h"
#include "engine/packing.h"

namespace mf::engine {

constexpr int MAX_GROUPED = 256;  // channels of a map that a grouped convolution makes

// A pointwise convolution. Output storage is group by group, each from a new block on.
struct Pointwise {
  struct Group {
    Products products;        // without offsets: they depend on the size of the map
    std::vector<int> inputs;  // storage of each input, or of the first of each step
  };
  std::vector<Group> groups;
  const float* bias = nullptr;  // [blocks][16]
  int blocks = 0;               // of all outputs
  int group_blocks = 0;
  int inputs = 0, outputs = 0;

  bool reads_bf16() const { return groups[0].products.format == Format::bf16; }  // of the map that it reads
  int parts() const { return reads_bf16() ? groups[0].products.parts : 0; }      // of its bfloat16

  bool shuffled = false;  // output n of group g is channel n * groups + g, instead of group after group
};

// Panels [first_panel, last_panel) of a group, which make `blocks` whole blocks of it: at most three.
struct Window {
  int group, first_panel, last_panel, first_block, blocks;
};

// A depthwise convolution; every block of outputs is a filter of one block of inputs.
struct DepthwiseLayer {
  const float* weight = nullptr;  // [blocks][9][16]
  const float* bias = nullptr;    // [blocks][16]
  std::vector<int> in_block;      // of each block of outputs
  Places places;                  // of the outputs, as dynamic ReLU counts them
  int stride = 1;
};

// y = x W' + b on rows of tokens, inputs in order
struct Linear {
  Products products;
  const float* bias = nullptr;
  int inputs = 0, outputs = 0;  // outputs with their gaps
};

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;
};

// Reads layers by name and packs them into an arena, in the order in which they are asked for. Throws
// std::invalid_argument for arrays that are missing or of another shape.
class LayerBuilder {
 public:
  LayerBuilder(const Config&, Reader&, Arena&, Precision, const Kernels&);

  const float* array(const std::string& name, int rows, int width);  // as it is
  Stem stem();
  Norm norm(const std::string& name, int width);

  // Output n of the packed layer is row target[n] of the stored weights, -1 for a gap; `factor` for the first of them:
  // the one whose result goes into an exponential
  Linear linear(const std::vector<std::string>& names, const std::vector<int>& outputs, int inputs,
                const std::vector<Places>& places, float factor = 1.0f);
  Linear linear(const std::string& name, int outputs, int inputs, float factor = 1.0f);

  // `source` is where the inputs lie; `shuffled`: the outputs leave in the order of a channel shuffle; `parts` of
  // bfloat16 are multiplied, or floats where there are none
  Pointwise pointwise(const std::string& name, int outputs, int inputs, const Places& source, bool shuffled, int parts,
                      bool to_map = true);
  std::vector<Window> windows(const Pointwise&) const;

  // `places` of the outputs in the numbering of what follows; `stored` maps that to the rows of the weight
  DepthwiseLayer depthwise(const std::string& name, const Places& places, const std::vector<int>& stored,
                           const std::vector<int>& in_block, int stride);
  // One with several filters a channel, after which channels may be shuffled to filter by filter
  DepthwiseLayer filters(const std::string& name, int channels, int multiplier, int stride);

  int parts(int stride) const;  // of bfloat16 that a pointwise layer multiplies at this stride; 0 for floats

  size_t taken() const { return arena_.taken(); }

 private:
  const Config& config_;
  Reader& read_;
  Arena& arena_;
  Packer pack_;
  const Precision precision_;
  const Format rows_;  // of linear layers
  const int bf16_step_;
};

}  // namespace mf::engine
