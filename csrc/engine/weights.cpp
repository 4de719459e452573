#include "engine/weights.h"

#include <algorithm>
#include <stdexcept>

namespace mf::engine {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;  // the kernels' exponential is one of base 2

// The parts of a backbone, each with its layers in the order of execution.
class BlockBuilder {
 public:
  BlockBuilder(const Config& config, LayerBuilder& build) : config_(config), build_(build) {}

  MobileToFormer bridge(const std::string& name, int channels) {
    const int D = config_.token_dim;
    MobileToFormer part;
    part.channels = channels;
    part.query_and_gate = build_.linear({name + ".query", name + ".gate"}, {channels, channels}, D,
                                        {in_order(channels), in_order(channels)}, LOG2_E);
    part.project = build_.linear(name + ".project", D, channels);
    part.norm = build_.norm(name + ".norm", D);
    return part;
  }

  TokenSide token_side(const std::string& name, int in_channels, int out_channels, const std::string (&relus)[2],
                       const Places (&places)[2]) {
    const int D = config_.token_dim;
    TokenSide side;
    side.mobile_to_former = bridge(name + ".mobile_to_former", in_channels);
    side.query = build_.linear(name + ".former.query", D, D, LOG2_E);
    side.project = build_.linear(name + ".former.project", D, D);
    side.norm = build_.norm(name + ".former.norm", D);
    side.ffn_expand = build_.linear(name + ".former.ffn_expand", 2 * D, D);
    side.ffn_project = build_.linear(name + ".former.ffn_project", D, 2 * D);
    side.ffn_norm = build_.norm(name + ".former.ffn_norm", D);
    side.key_and_value =
        build_.linear({name + ".former_to_mobile.key", name + ".former_to_mobile.value"}, {out_channels, out_channels},
                      D, {in_order(out_channels), in_order(out_channels)}, LOG2_E);
    side.reduced = D / 4;
    side.reduce = build_.linear({name + relus[0] + ".reduce", name + relus[1] + ".reduce"}, {D / 4, D / 4}, D,
                                {in_order(D / 4), in_order(D / 4)});
    for (int i = 0; i < 2; ++i) {
      const int K = int(std::count_if(places[i].begin(), places[i].end(), [](int place) { return place >= 0; }));
      Places both = places[i];
      for (int place : places[i]) both.push_back(place < 0 ? -1 : K + place);
      side.expand[i] = build_.linear({name + relus[i] + ".expand"}, {2 * K}, D / 4, {both});
    }
    return side;
  }

  Block block(const std::string& name, int C, int stride, const BlockConfig& config) {
    Block b;
    b.config = config;
    b.weights_at = build_.taken();
    b.in_channels = C;
    const int N = config.out_channels, parts = build_.parts(stride);
    b.has_skip = config.kind != Kind::down && config.stride == 1 && C == N;
    if (config.kind == Kind::lite) {
      b.depthwise = build_.filters(name + ".expand", C, config.expansion, config.stride);
      b.project = build_.pointwise(name + ".project", N, C * config.expansion, b.depthwise.places, false, parts);
    } else if (config.kind == Kind::same) {
      const int K = C * config.expansion;
      const Places hidden = in_groups(K, config_.groups);
      std::vector<int> stored(K), in_block(hidden.size() / BLOCK);
      for (int i = 0; i < K; ++i) stored[i] = i;
      for (int i = 0; i < int(in_block.size()); ++i) in_block[i] = i;
      b.tokens = token_side(name, C, N, {".expand_relu", ".depthwise_relu"}, {hidden, hidden});
      b.maps_at = build_.taken();
      b.expand = build_.pointwise(name + ".expand", K, C, in_order(C), true, parts, false);
      b.windows = build_.windows(b.expand);
      b.depthwise = build_.depthwise(name + ".depthwise", hidden, stored, in_block, 1);
      b.project = build_.pointwise(name + ".project", N, K, hidden, true, parts);
    } else {
      const bool shuffled = config_.groups > 1;
      const Places first = in_filters(C, config.expansion, shuffled);
      const Places second = in_filters(N, config.second_expansion, shuffled);
      b.tokens = token_side(name, C, N, {".down_relu", ".expand_relu"}, {first, second});
      b.maps_at = build_.taken();
      b.depthwise = build_.filters(name + ".down", C, config.expansion, config.stride);
      b.squeeze = build_.pointwise(name + ".squeeze", N, C * config.expansion, first, false, parts);
      b.second = build_.filters(name + ".expand", N, config.second_expansion, 1);
      b.project = build_.pointwise(name + ".project", N, N * config.second_expansion, second, false, parts);
    }
    return b;
  }

 private:
  const Config& config_;
  LayerBuilder& build_;
};

void check(const Config& config) {
  if (config.blocks.empty()) throw std::invalid_argument("config: blocks: expected at least one, got none");
  if (config.groups != 1 && config.groups != 4) {
    throw std::invalid_argument("config: groups: expected 1 or 4, got " + std::to_string(config.groups));
  }
  if (config.num_tokens < 1 || config.num_tokens > MAX_TOKENS) {
    throw std::invalid_argument("config: num_tokens: expected 1 to 8, got " + std::to_string(config.num_tokens));
  }
  for (const BlockConfig& block : config.blocks) {
    if (config.groups > 1 && block.out_channels > MAX_GROUPED) {
      throw std::invalid_argument("config: blocks: expected at most " + std::to_string(MAX_GROUPED) +
                                  " channels of a grouped block, got " + std::to_string(block.out_channels));
    }
  }
}

}  // namespace

Weights::Weights(const Config& config, LayerBuilder& build) {
  check(config);
  BlockBuilder part(config, build);
  tokens = build.array("tokens", config.num_tokens, config.token_dim);
  stem = build.stem();
  int C = config.stem_channels, stride = 2;
  for (size_t i = 0; i < config.blocks.size(); ++i) {
    stride *= config.blocks[i].stride;
    blocks.push_back(part.block("blocks." + std::to_string(i), C, stride, config.blocks[i]));
    C = config.blocks[i].out_channels;
  }
  bridge_at = build.taken();
  bridge = part.bridge("mobile_to_former", C);
  end = build.taken();
}

}  // namespace mf::engine
