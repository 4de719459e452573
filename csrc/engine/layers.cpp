#include "engine/layers.h"

#include <algorithm>
#include <stdexcept>

namespace mf::engine {

LayerBuilder::LayerBuilder(const Config& config, Reader& read, Arena& arena, Precision precision,
                           const Kernels& kernels)
    : config_(config), read_(read), arena_(arena), pack_(arena, kernels), precision_(precision),
      rows_(precision == Precision::bfloat16 ? Format::i16_weight : Format::f32), bf16_step_(kernels.bf16_step) {}

const float* LayerBuilder::array(const std::string& name, int rows, int width) {
  const float* values = read_(name, {rows, width});
  return pack_.vector(rows * width, [=](int i) { return values[i]; });
}

Stem LayerBuilder::stem() {
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

Norm LayerBuilder::norm(const std::string& name, int width) {
  const float* weight = read_(name + ".weight", {width});
  const float* bias = read_(name + ".bias", {width});
  return {pack_.vector(width, [=](int i) { return weight[i]; }), pack_.vector(width, [=](int i) { return bias[i]; })};
}

Linear LayerBuilder::linear(const std::vector<std::string>& names, const std::vector<int>& outputs, int inputs,
                            const std::vector<Places>& places, float factor) {
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

Linear LayerBuilder::linear(const std::string& name, int outputs, int inputs, float factor) {
  return linear({name}, {outputs}, inputs, {in_order(outputs)}, factor);
}

Pointwise LayerBuilder::pointwise(const std::string& name, int outputs, int inputs, const Places& source, bool shuffled,
                                  int parts, bool to_map) {
  const Format format = parts > 0 ? Format::bf16 : Format::f32;
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
        const int first = place / bf16_step_ * bf16_step_;
        if (!group.inputs.empty() && group.inputs.back() == first) continue;
        group.inputs.push_back(first);
        for (int member = first; member < first + bf16_step_; ++member) {
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
    group.products = pack_.products(format, width, int(group.inputs.size()), element, parts);
    layer.groups.push_back(std::move(group));
  }
  layer.bias = pack_.vector(layer.blocks * BLOCK, [&](int i) {
    const int g = i / (layer.group_blocks * BLOCK), n = i % (layer.group_blocks * BLOCK);
    return n < width ? bias[row(g, n)] : 0.0f;
  });
  return layer;
}

// Panels that together end where a block ends
std::vector<Window> LayerBuilder::windows(const Pointwise& layer) const {
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

DepthwiseLayer LayerBuilder::depthwise(const std::string& name, const Places& places, const std::vector<int>& stored,
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

DepthwiseLayer LayerBuilder::filters(const std::string& name, int channels, int multiplier, int stride) {
  const bool shuffled = config_.groups > 1;
  std::vector<int> stored(channels * multiplier);
  for (int i = 0; i < int(stored.size()); ++i) {
    stored[i] = shuffled ? i % channels * multiplier + i / channels : i;
  }
  std::vector<int> in_block;
  for (int i = 0; i < multiplier * blocks_of(channels); ++i) in_block.push_back(i % blocks_of(channels));
  return depthwise(name, in_filters(channels, multiplier, shuffled), stored, in_block, stride);
}

// Rounding serves the last blocks, whose weights are most of all and whose rounding goes through few attentions: then
// bfloat16 and float32 name the same class of 99 images in 100. From stride 16 on it is 98, from 8 on 96. Before them
// tiles multiply high and low parts, 16 bits of a float, in less time than vectors multiply floats.
int LayerBuilder::parts(int stride) const {
  if (precision_ == Precision::float32) return 0;
  if (stride >= 32) return 1;
  return bf16_step_ > 2 ? 2 : 0;
}

}  // namespace mf::engine
