// The backbone of a folded network: everything but its classifier, packed for one instruction set.
#pragma once

#include "engine/layers.h"

namespace mf::engine {

struct MobileToFormer {
  Linear query_and_gate;  // to [blocks of C][16] twice
  Linear project;
  Norm norm;
  int channels = 0;
};

struct TokenSide {
  MobileToFormer mobile_to_former;
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
  Weights() = default;
  Weights(const Config&, LayerBuilder&);  // throws std::invalid_argument

  const float* tokens = nullptr;  // [M][D]
  Stem stem;                      // without rows
  std::vector<Block> blocks;
  MobileToFormer bridge;          // the last one, from the map of the last block
  size_t bridge_at = 0, end = 0;  // bytes of the arena before its weights, and before what follows the backbone
};

}  // namespace mf::engine
