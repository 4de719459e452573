// A folded network, packed for one instruction set.
//
// A map's channels have a logical number, as in the published network, and a place in storage: `Place` lists say which.
// Storage may hold gaps (the last block of a map, of a group or of a filter), whose values are always zero.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "engine/kernels.h"

namespace mf::engine {

enum class Kind { lite, same, down };

struct BlockConfig {
  Kind kind;
  int out_channels, expansion, second_expansion, stride;
};

struct Config {
  int in_chans, stem_channels, num_tokens, token_dim, hidden_features, groups, num_classes;
  bool spatial_dynamic_relu;
  std::vector<BlockConfig> blocks;
  std::vector<float> mean, std;  // of images given as bytes; empty where unknown
};

struct Array {
  const float* data;
  std::vector<long> shape;
};

using Arrays = std::map<std::string, Array>;
using Shapes = std::map<std::string, std::vector<long>>;

inline int blocks_of(int channels) { return (channels + BLOCK - 1) / BLOCK; }

// Memory of one network, handed out in the order of execution, aligned to vectors, zero at first.
class Arena {
 public:
  template <class T = float>
  T* take(size_t count) {
    return static_cast<T*>(bytes((count * sizeof(T) + 63) / 64 * 64));
  }

  // Bytes handed out so far, with what was left over at the ends of chunks
  size_t taken() const { return before_ + (chunks_.empty() ? 0 : chunks_.back().size - left_); }

  // What was handed out from the `begin`-th byte on, as far as it lies together and not beyond the `end`-th
  std::span<const char> range(size_t begin, size_t end) const;

 private:
  void* bytes(size_t size);
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  struct Chunk {
    std::unique_ptr<std::byte[], Free> memory;
    size_t size;
  };
  std::vector<Chunk> chunks_;
  size_t before_ = 0;  // bytes of all chunks but the last
  std::byte* next_ = nullptr;
  size_t left_ = 0;
};

// Logical number of the channel at a place in storage, -1 in a gap
using Places = std::vector<int>;

Places in_order(int channels);                                   // 0 1 2 ..., then the gap of the last block
Places in_filters(int channels, int multiplier, bool shuffled);  // all first filters, all second ones, each in blocks
Places in_groups(int channels, int groups);                      // each group in blocks of its own, shuffled

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

  bool half() const { return groups[0].products.format == Format::bf16; }  // of the map that it reads
  int pieces() const { return half() ? groups[0].products.pieces : 0; }    // of its bfloat16

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

struct MobileToFormer {
  Linear query_and_gate;  // to [blocks of C][16] twice
  Linear project;
  Norm norm;
  int channels = 0;
};

struct TokenSide {
  MobileToFormer gather;
  Linear query, project, ffn_expand, ffn_project;
  Norm norm, ffn_norm;
  Linear key_and_value;  // to [blocks of C'][16] twice
  Linear reduce;         // of both dynamic ReLUs
  Linear expand[2];      // to theta1 [blocks][16] and theta2 [blocks][16], in the order of storage
  int reduced = 0;       // width of one
};

struct Block {
  BlockConfig config;
  int in_channels = 0;
  bool has_skip = false;
  Pointwise expand;             // same
  std::vector<Window> windows;  // of it
  DepthwiseLayer depthwise;     // every kind; the first one of down
  Pointwise squeeze;            // down
  DepthwiseLayer second;        // down
  Pointwise project;
  TokenSide tokens;                    // same, down
  size_t weights_at = 0, maps_at = 0;  // bytes of the arena before its weights, and before those of its convolutions
};

struct Weights {
  Weights(const Config&, const Arrays&, bool bf16, const Kernels&);  // throws std::invalid_argument

  static Shapes shapes_of(const Config&);  // of the arrays that such a network takes

  Arena arena;
  const float* tokens = nullptr;  // [M][D]
  Stem stem;                      // without rows
  std::vector<Block> blocks;
  MobileToFormer gather;
  Pointwise head;
  Linear fc, classifier;
  size_t head_at = 0, fc_at = 0;  // bytes of the arena before the weights of the two

 private:
  Weights() = default;
  void build(const Config&, const Arrays*, bool bf16, const Kernels&, Shapes*);
};

}  // namespace mf::engine
