#include "engine/workspace.h"

#include <algorithm>
#include <numeric>

namespace mf::engine {
Map make_map(Arena& arena, int channels, int height, int width, bool border) {
  Map map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.blocks = blocks_of(channels);
  const int edge = border ? 1 : 0;
  map.row = ptrdiff_t(width + 2 * edge) * BLOCK;
  map.block = map.row * (height + 2 * edge);
  map.data = arena.take(map.block * map.blocks) + edge * (map.row + BLOCK);
  return map;
}

Offsets offsets_of(const Pointwise& layer, ptrdiff_t block, const Kernels& kernels) {
  const int channels = layer.reads_bf16() ? kernels.bf16_run : BLOCK;
  Offsets offsets;
  for (const Pointwise::Group& group : layer.groups) {
    std::vector<int32_t>& of = offsets.emplace_back();
    for (int place : group.inputs) of.push_back(int32_t(place / channels * block + place % channels));
  }
  return offsets;
}

namespace {

int halved(int side) { return (side + 1) / 2; }

// The first block that reads more of weights than of the maps of all images; spatial slopes need the scores of their
// image
size_t first_together_of(const Config& config, const Weights& weights, int height, int width) {
  int h = halved(height), w = halved(width), C = config.stem_channels;
  for (size_t i = 0; i < weights.blocks.size() && !config.spatial_dynamic_relu; ++i) {
    const Block& b = weights.blocks[i];
    const size_t end = i + 1 < weights.blocks.size() ? weights.blocks[i + 1].weights_at : weights.bridge_at;
    const size_t maps = size_t(TOGETHER) * h * w * C * sizeof(float);
    if (2 * maps < end - b.weights_at && b.config.kind != Kind::lite) return i;
    if (b.config.stride == 2) h = halved(h), w = halved(w);
    C = b.config.out_channels;
  }
  return weights.blocks.size();
}

}  // namespace

Workspace::Workspace(const Config& config, const Weights& weights, const Kernels& kernels, int height, int width,
                     int threads, int images, int last_parts)
    : height(height), width(width), images(images), first_together(first_together_of(config, weights, height, width)),
      results(images) {
  const int M = config.num_tokens, D = config.token_dim;
  int h = halved(height), w = halved(width), C = config.stem_channels;
  stem = make_map(arena, C, h, w, true);
  scratch.resize(threads);

  size_t flat_bytes = 0, slope_floats = 0;
  int grouped_blocks = 0;
  int max_blocks = blocks_of(C);
  Map in = stem;
  for (size_t i = 0; i < weights.blocks.size(); ++i) {
    const Block& b = weights.blocks[i];
    BlockSpace space;
    if (b.config.stride == 2) h = halved(h), w = halved(w);
    space.height = h;
    space.width = w;
    const int N = b.config.out_channels;
    const size_t positions = size_t(h) * w;
    const Block* next = i + 1 < weights.blocks.size() ? &weights.blocks[i + 1] : nullptr;
    // a depthwise convolution reads a border, a pointwise one of bfloat16 what is rounded to it
    const bool border = next && next->config.kind != Kind::same;
    const int parts = !next ? last_parts : next->config.kind == Kind::same ? next->expand.parts() : 0;
    for (int image = 0; image < images; ++image) {
      BlockResult result;
      if (image > 0 && i + 1 < first_together) {
        result = results[0].back();
      } else {
        result.out = make_map(arena, N, h, w, border);
        if (parts > 0) {
          Bfloat16Map& bf16 = result.out.bf16 = bf16_map(nullptr, parts, blocks_of(N), int(positions), kernels);
          bf16.data = arena.take<uint16_t>(bf16_size(bf16));
        }
        if (b.config.kind != Kind::lite) {
          result.keys = arena.take(size_t(N) * MAX_TOKENS);
          result.values = arena.take(size_t(blocks_of(N)) * M * BLOCK);
        }
      }
      results[image].push_back(result);
    }
    // a depthwise output and the layer that reads it
    const auto flat_map = [&](const DepthwiseLayer& made, const Pointwise& read) {
      const int blocks = int(made.in_block.size());
      const Bfloat16Map bf16 = bf16_map(nullptr, read.parts(), blocks, int(positions), kernels);
      const size_t floats = made.places.size() * positions;
      flat_bytes =
          std::max(flat_bytes, read.reads_bf16() ? bf16_size(bf16) * sizeof(uint16_t) : floats * sizeof(float));
      return offsets_of(read, read.reads_bf16() ? bf16.run : ptrdiff_t(positions) * BLOCK, kernels);
    };
    const auto map_before = [&](const Pointwise& read) {
      return offsets_of(read, read.reads_bf16() ? in.bf16.run : in.block, kernels);
    };
    grouped_blocks = std::max({grouped_blocks, b.project.blocks, b.squeeze.blocks});
    if (b.config.kind == Kind::same) {
      space.expand = map_before(b.expand);
      space.project = flat_map(b.depthwise, b.project);
    } else if (b.config.kind == Kind::down) {
      space.middle = make_map(arena, N, h, w, true);
      space.squeeze = flat_map(b.depthwise, b.squeeze);
      space.project = flat_map(b.second, b.project);
    } else {
      space.project = flat_map(b.depthwise, b.project);
    }
    if (b.config.kind != Kind::lite) {
      space.queries = arena.take(size_t(C) * MAX_TOKENS);
      slope_floats = std::max({slope_floats, 2 * b.depthwise.places.size(), 2 * b.second.places.size()});
    }
    for (Scratch& own : scratch) {
      const bool panels = b.config.kind == Kind::same;
      own.panel.push_back(panels ? arena.take(size_t(3) * (h + 2) * (w + 2) * BLOCK) : nullptr);
    }
    blocks.push_back(space);
    in = results[0].back().out;
    C = N;
    max_blocks = std::max(max_blocks, blocks_of(C));
  }
  flat = arena.take(flat_bytes / sizeof(float));
  bridge_queries = arena.take(size_t(C) * MAX_TOKENS);
  image_half = (width / 2 + 2 + BLOCK) / BLOCK * BLOCK;
  in_order.resize(std::max(2 * D, max_blocks * BLOCK));
  std::iota(in_order.begin(), in_order.end(), 0);

  const size_t rows = size_t(images) * M;
  tokens = arena.take(rows * D);
  query_gate = arena.take(rows * 2 * max_blocks * BLOCK);
  key_value = arena.take(rows * 2 * max_blocks * BLOCK);
  gathered = arena.take(rows * max_blocks * BLOCK);
  row = arena.take(rows * D);
  wide = arena.take(rows * 2 * D);
  reduced = arena.take(rows * blocks_of(D / 4) * 2 * BLOCK);
  for (float*& each : slopes) each = arena.take((config.spatial_dynamic_relu ? rows : images) * slope_floats);
  if (config.spatial_dynamic_relu) {
    const size_t positions = size_t(stem.height) * stem.width;
    scores = arena.take(positions * BLOCK);
    mix = arena.take(positions * MAX_TOKENS);
  }
  for (Span& span : spans) {
    span.reference = arena.take(BLOCK);
    span.total = arena.take(BLOCK);
    span.sums = arena.take(size_t(max_blocks) * M * BLOCK);
  }
  for (Scratch& own : scratch) {
    if (config.spatial_dynamic_relu && weights.blocks.back().project.reads_bf16())
      own.plane = arena.take(size_t(stem.height) * stem.width * BLOCK);
    if (config.groups > 1) own.grouped = arena.take(size_t(grouped_blocks) * GROUPED_CHUNK * BLOCK);
    own.image_row = arena.take(width);
    own.image_rows = arena.take(size_t(config.in_chans) * 6 * image_half);
  }
}

}  // namespace mf::engine
