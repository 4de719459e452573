// What a network is, as its file says it, and how precisely it is to be computed.
#pragma once

#include <vector>

namespace mf::engine {

enum class Kind { lite, same, down };

struct BlockConfig {
  Kind kind;
  int out_channels, expansion, second_expansion, stride;
};

struct Config {
  int in_chans, stem_channels, num_tokens, token_dim, hidden_features, groups;
  int num_classes;  // 0: a network without a classifier, whose maps and tokens are all there is
  bool spatial_dynamic_relu;
  std::vector<BlockConfig> blocks;
  std::vector<float> mean, std;  // of images given as bytes; empty where unknown
};

// Of weights and products: LayerBuilder says which layer takes them how.
enum class Precision { float32, bfloat16 };

}  // namespace mf::engine
