#include "engine/weights.h"

#include "engine/packing.h"

#include <algorithm>
#include <stdexcept>

namespace mf::engine {
namespace {

constexpr float LOG2_E = 1.4426950408889634f;  // the kernels' exponential is one of base 2

// Reads and packs the layers of a network in the order of execution.
class Builder {
 public:
  Builder(const Config& config, const Arrays* arrays, Arena& arena, bool bf16, const Kernels& kernels)
      : config_(config), read_(arrays), pack_(arena, kernels), bf16_(bf16),
        rows_(bf16 ? Format::i16_weight : Format::f32), half_step_(kernels.half_step) {}

  // Output n of the packed layer is row target[n] of the stored weight, -1 for a gap; factor by packed output
  Linear linear(const std::vector<std::string>& names, const std::vector<int>& outputs, int inputs,
                const std::vector<Places>& places, float factor = 1.0f) {
    std::vector<const float*> weights, biases;
    std::vector<std::pair<int, int>> rows;  // (layer, row) of every packed output
    for (size_t i = 0; i < names.size(); ++i) {
      weights.push_back(read_(names[i] + ".weight", {outputs[i], inputs}));
      biases.push_back(read_(names[i] + ".bias", {outputs[i]}));
      for (int place : places[i]) rows.push_back({int(i), place});
    }
    // the factor is that of the first layer: the one whose result goes into an exponential
    const auto of = [&](int layer) { return layer == 0 ? factor : 1.0f; };
    Linear result;
    result.inputs = inputs;
    result.outputs = int(rows.size());
    result.bias = pack_.vector(result.outputs, [&](int n) {
      const auto [layer, row] = rows[n];
      return row < 0 ? 0.0f : biases[layer][row] * of(layer);
    });
    result.products = pack_.products(rows_, result.outputs, inputs, [&](int n, int k) {
      const auto [layer, row] = rows[n];
      return row < 0 ? 0.0f : weights[layer][long(row) * inputs + k] * of(layer);
    });
    return result;
  }

  Linear linear(const std::string& name, int outputs, int inputs, float factor = 1.0f) {
    return linear({name}, {outputs}, inputs, {in_order(outputs)}, factor);
  }

  // Panels that together end where a block ends
  std::vector<Window> windows(const Pointwise& layer) {
    std::vector<Window> all;
    const int lanes = pack_.lanes();
    for (int g = 0; g < int(layer.groups.size()); ++g) {
      const int vectors = layer.groups[g].products.vectors;
      for (int panel = 0; panel < panel_count(vectors);) {
        Window window{g, panel, panel, first_vector(vectors, panel) * lanes / BLOCK, 0};
        int lane;
        do {
          lane = (first_vector(vectors, panel) + panel_vectors(vectors, panel)) * lanes;
          ++panel;
        } while (lane % BLOCK != 0);
        window.last_panel = panel;
        window.blocks = lane / BLOCK - window.first_block;
        all.push_back(window);
      }
    }
    return all;
  }

  Norm norm(const std::string& name, int width) {
    const float* weight = read_(name + ".weight", {width});
    const float* bias = read_(name + ".bias", {width});
    return {pack_.vector(width, [=](int i) { return weight[i]; }), pack_.vector(width, [=](int i) { return bias[i]; })};
  }

  // `source` is where the inputs lie; `shuffled`: the outputs leave in the order of a channel shuffle
  Pointwise pointwise(const std::string& name, int outputs, int inputs, const Places& source, bool shuffled, int pieces,
                      bool to_map = true) {
    const Format format = pieces > 0 ? Format::bf16 : Format::f32;
    const int G = config_.groups, N = outputs / G, K = inputs / G;
    const float* weight = read_(name + ".weight", {outputs, K, 1, 1});
    const float* bias = read_(name + ".bias", {outputs});
    std::vector<int> storage(inputs, -1);
    for (size_t s = 0; s < source.size(); ++s) {
      if (source[s] >= 0) storage[source[s]] = int(s);
    }
    Pointwise layer;
    layer.inputs = K;
    layer.outputs = outputs;
    layer.shuffled = shuffled && G > 1;
    // Few outputs of all groups together are one product, with zeros between groups: that takes hardly more vector
    // products than the groups apart, each of which would fill a block on its own, and leaves them in order.
    const bool merged = G > 1 && to_map && outputs <= 3 * BLOCK / 2;
    const int products = merged ? 1 : G, width = outputs / products, depth = inputs / products;
    // row of the stored weight that output n of product g is
    const auto row = [&](int g, int n) {
      if (!merged) return g * N + n;
      return shuffled ? n % G * N + n / G : n;
    };
    layer.group_blocks = blocks_of(width);
    layer.blocks = products * layer.group_blocks;
    for (int g = 0; g < products; ++g) {
      Pointwise::Group group;
      // what each input of the product is in logical order, -1 where a step has one that the group does not read
      std::vector<int> channels;
      std::map<int, int> channel_at;
      for (int k = 0; k < depth; ++k) channel_at[storage[g * depth + k]] = g * depth + k;
      for (const auto& [place, channel] : channel_at) {
        if (format == Format::bf16) {
          const int first = place / half_step_ * half_step_;
          if (!group.inputs.empty() && group.inputs.back() == first) continue;
          group.inputs.push_back(first);
          for (int member = first; member < first + half_step_; ++member) {
            const auto found = channel_at.find(member);
            channels.push_back(found == channel_at.end() ? -1 : found->second);
          }
        } else {
          group.inputs.push_back(place);
          channels.push_back(channel);
        }
      }
      const auto element = [&](int n, int k) {
        const int output = row(g, n), channel = channels[k];
        return channel >= 0 && channel / K == output / N ? weight[long(output) * K + channel % K] : 0.0f;
      };
      group.products = pack_.products(format, width, int(group.inputs.size()), element, pieces);
      layer.groups.push_back(std::move(group));
    }
    layer.bias = pack_.vector(layer.blocks * BLOCK, [&](int i) {
      const int g = i / (layer.group_blocks * BLOCK), n = i % (layer.group_blocks * BLOCK);
      return n < width ? bias[row(g, n)] : 0.0f;
    });
    return layer;
  }

  // `places` of the outputs in the numbering of what follows; `stored` maps that to the rows of the weight
  DepthwiseLayer depthwise(const std::string& name, const Places& places, const std::vector<int>& stored,
                           const std::vector<int>& in_block, int stride) {
    const int outputs = int(stored.size());
    const float* weight = read_(name + ".weight", {outputs, 1, 3, 3});
    const float* bias = read_(name + ".bias", {outputs});
    DepthwiseLayer layer;
    layer.places = places;
    layer.in_block = in_block;
    layer.stride = stride;
    const int width = int(places.size());
    layer.weight = pack_.vector(width * 9, [&](int i) {
      const int place = places[i / BLOCK / 9 * BLOCK + i % BLOCK];
      return place < 0 ? 0.0f : weight[stored[place] * 9 + i / BLOCK % 9];
    });
    layer.bias = pack_.vector(width, [&](int i) { return places[i] < 0 ? 0.0f : bias[stored[places[i]]]; });
    return layer;
  }

  // One with several filters a channel, after which channels may be shuffled to filter by filter
  DepthwiseLayer filters(const std::string& name, int channels, int multiplier, int stride) {
    const bool shuffled = config_.groups > 1;
    std::vector<int> stored(channels * multiplier);
    for (int i = 0; i < int(stored.size()); ++i) {
      stored[i] = shuffled ? i % channels * multiplier + i / channels : i;
    }
    std::vector<int> in_block;
    for (int i = 0; i < multiplier * blocks_of(channels); ++i) in_block.push_back(i % blocks_of(channels));
    return depthwise(name, in_filters(channels, multiplier, shuffled), stored, in_block, stride);
  }

  MobileToFormer gather(const std::string& name, int channels) {
    const int D = config_.token_dim;
    MobileToFormer part;
    part.channels = channels;
    part.query_and_gate = linear({name + ".query", name + ".gate"}, {channels, channels}, D,
                                 {in_order(channels), in_order(channels)}, LOG2_E);
    part.project = linear(name + ".project", D, channels);
    part.norm = norm(name + ".norm", D);
    return part;
  }

  TokenSide token_side(const std::string& name, int in_channels, int out_channels, const std::string (&relus)[2],
                       const Places (&places)[2]) {
    const int D = config_.token_dim;
    TokenSide side;
    side.gather = gather(name + ".mobile_to_former", in_channels);
    side.query = linear(name + ".former.query", D, D, LOG2_E);
    side.project = linear(name + ".former.project", D, D);
    side.norm = norm(name + ".former.norm", D);
    side.ffn_expand = linear(name + ".former.ffn_expand", 2 * D, D);
    side.ffn_project = linear(name + ".former.ffn_project", D, 2 * D);
    side.ffn_norm = norm(name + ".former.ffn_norm", D);
    side.key_and_value =
        linear({name + ".former_to_mobile.key", name + ".former_to_mobile.value"}, {out_channels, out_channels}, D,
               {in_order(out_channels), in_order(out_channels)}, LOG2_E);
    side.reduced = D / 4;
    side.reduce = linear({name + relus[0] + ".reduce", name + relus[1] + ".reduce"}, {D / 4, D / 4}, D,
                         {in_order(D / 4), in_order(D / 4)});
    for (int i = 0; i < 2; ++i) {
      const int K = int(std::count_if(places[i].begin(), places[i].end(), [](int place) { return place >= 0; }));
      Places both = places[i];
      for (int place : places[i]) both.push_back(place < 0 ? -1 : K + place);
      side.expand[i] = linear({name + relus[i] + ".expand"}, {2 * K}, D / 4, {both});
    }
    return side;
  }

  Block block(const std::string& name, int C, const BlockConfig& config) {
    Block b;
    b.config = config;
    b.in_channels = C;
    const int N = config.out_channels;
    b.has_skip = config.kind != Kind::down && config.stride == 1 && C == N;
    if (config.kind == Kind::lite) {
      b.depthwise = filters(name + ".expand", C, config.expansion, config.stride);
      b.project = pointwise(name + ".project", N, C * config.expansion, b.depthwise.places, false, maps());
    } else if (config.kind == Kind::same) {
      const int K = C * config.expansion;
      const Places hidden = in_groups(K, config_.groups);
      std::vector<int> stored(K), in_block(hidden.size() / BLOCK);
      for (int i = 0; i < K; ++i) stored[i] = i;
      for (int i = 0; i < int(in_block.size()); ++i) in_block[i] = i;
      b.tokens = token_side(name, C, N, {".expand_relu", ".depthwise_relu"}, {hidden, hidden});
      b.maps_at = pack_.taken();
      b.expand = pointwise(name + ".expand", K, C, in_order(C), true, maps(), false);
      b.windows = windows(b.expand);
      b.depthwise = depthwise(name + ".depthwise", hidden, stored, in_block, 1);
      b.project = pointwise(name + ".project", N, K, hidden, true, maps());
    } else {
      const bool shuffled = config_.groups > 1;
      const Places first = in_filters(C, config.expansion, shuffled);
      const Places second = in_filters(N, config.second_expansion, shuffled);
      b.tokens = token_side(name, C, N, {".down_relu", ".expand_relu"}, {first, second});
      b.maps_at = pack_.taken();
      b.depthwise = filters(name + ".down", C, config.expansion, config.stride);
      b.squeeze = pointwise(name + ".squeeze", N, C * config.expansion, first, false, maps());
      b.second = filters(name + ".expand", N, config.second_expansion, 1);
      b.project = pointwise(name + ".project", N, N * config.second_expansion, second, false, maps());
    }
    return b;
  }

  // Pieces of bfloat16 that a pointwise layer of the block at work multiplies; 0 for floats. One piece serves the last
  // blocks, whose weights are most of all and whose rounding goes through few attentions: then bfloat16 and float32 name
  // the same class of 99 images in 100. From stride 16 on it is 98, from 8 on 96. Before them tiles multiply two pieces,
  // 16 bits of a float, in less time than vectors multiply floats.
  int maps() const {
    if (!bf16_) return 0;
    if (stride_ >= 32) return 1;
    return half_step_ > 2 ? 2 : 0;
  }

  const Shapes& asked() const { return read_.asked(); }

  void build(Weights& w) {
    const int D = config_.token_dim;
    const float* tokens = read_("tokens", {config_.num_tokens, D});
    w.tokens = pack_.vector(config_.num_tokens * D, [=](int i) { return tokens[i]; });
    w.stem = stem();
    int C = config_.stem_channels, stride = 2;
    for (size_t i = 0; i < config_.blocks.size(); ++i) {
      stride *= config_.blocks[i].stride;
      stride_ = stride;
      const size_t at = pack_.taken();
      w.blocks.push_back(block("blocks." + std::to_string(i), C, config_.blocks[i]));
      w.blocks.back().weights_at = at;
      C = config_.blocks[i].out_channels;
    }
    w.head_at = pack_.taken();
    w.gather = gather("mobile_to_former", C);
    // channel i of the shuffled map, which the head's convolution reads, is this one of the last map
    Places source = in_order(C);
    if (config_.groups > 1) {
      for (int i = 0; i < C; ++i) source[i % config_.groups * (C / config_.groups) + i / config_.groups] = i;
    }
    w.head = pointwise("head.expand", 6 * C, C, source, false, maps(), false);
    w.fc_at = pack_.taken();
    w.fc = linear("head.fc", config_.hidden_features, 6 * C + D);
    w.classifier = linear("head.classifier", config_.num_classes, config_.hidden_features);
    read_.finish();
  }

 private:
  Stem stem() {
    const int N = config_.stem_channels, K = 9 * config_.in_chans;
    if (N % 4 != 0)
      throw std::invalid_argument("config: stem_channels: expected a multiple of 4, got " + std::to_string(N));
    const float* weight = read_("stem.weight", {N, config_.in_chans, 3, 3});
    const float* bias = read_("stem.bias", {N});
    Stem layer;
    layer.channels = config_.in_chans;
    layer.outputs = N;
    const int lanes = pack_.lanes();
    layer.weight = pack_.vector(K * N, [=](int i) {
      const int first = i / (K * lanes) * lanes, count = std::min(lanes, N - first), within = i - first * K;
      return weight[(first + within % count) * K + within / count];
    });
    layer.bias = pack_.vector(N, [=](int n) { return bias[n]; });
    return layer;
  }

  const Config& config_;
  Reader read_;
  Packer pack_;
  const bool bf16_;
  const Format rows_;  // of linear layers
  const int half_step_;
  int stride_ = 2;  // of the block at work
};

}  // namespace

void Weights::build(const Config& config, const Arrays* arrays, bool bf16, const Kernels& kernels, Shapes* shapes) {
  if (config.blocks.empty()) throw std::invalid_argument("config: blocks: expected at least one, got none");
  if (config.groups != 1 && config.groups != 4) {
    throw std::invalid_argument("config: groups: expected 1 or 4, got " + std::to_string(config.groups));
  }
  if (6 * config.blocks.back().out_channels / config.groups % BLOCK != 0 && config.groups > 1) {
    throw std::invalid_argument("config: groups: the classifier's " + std::to_string(config.groups) +
                                " groups do not fill whole blocks of 16 channels");
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
  Builder builder(config, arrays, arena, bf16, kernels);
  builder.build(*this);
  if (shapes) *shapes = builder.asked();
}

Weights::Weights(const Config& config, const Arrays& arrays, bool bf16, const Kernels& kernels) {
  build(config, &arrays, bf16, kernels, nullptr);
}

Shapes Weights::shapes_of(const Config& config) {
  Shapes shapes;
  Weights().build(config, nullptr, false, *runnable().front(), &shapes);
  return shapes;
}

}  // namespace mf::engine
