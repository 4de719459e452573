#include "engine/workspace.h"

#include <algorithm>
#include <numeric>

namespace mf::engine {
namespace {

Map make_map(Arena& arena, int channels, int height, int width, bool border, bool half = false) {
  Map map;
  map.channels = channels;
  map.height = height;
  map.width = width;
  map.blocks = blocks_of(channels);
  const int edge = border ? 1 : 0;
  map.row = ptrdiff_t(width + 2 * edge) * BLOCK;
  map.block = map.row * (height + 2 * edge);
  map.data = arena.take(map.block * map.blocks) + edge * (map.row + BLOCK);
  if (half) {
    map.half_block = ptrdiff_t(height) * width * BLOCK;
    map.half = arena.take<uint16_t>(map.half_block * map.blocks);
  }
  return map;
}

std::vector<int32_t> offsets_of(const std::vector<int>& storage, ptrdiff_t block) {
  std::vector<int32_t> offsets;
  for (int place : storage) offsets.push_back(int32_t(place / BLOCK * block + place % BLOCK));
  return offsets;
}

Offsets offsets_of(const Pointwise& layer, ptrdiff_t block) {
  Offsets offsets;
  for (const Pointwise::Group& group : layer.groups) offsets.push_back(offsets_of(group.inputs, block));
  return offsets;
}

}  // namespace

Workspace::Workspace(const Config& config, const Weights& weights, int height, int width, int threads)
    : height(height), width(width) {
  const int M = config.num_tokens, D = config.token_dim;
  const auto halved = [](int side) { return (side + 1) / 2; };
  int h = halved(height), w = halved(width), C = config.stem_channels;
  stem = make_map(arena, C, h, w, true);
  scratch.resize(threads);

  size_t flat_floats = 0, slope_floats = 0;
  int grouped_blocks = 0;
  int widest = C, most_blocks = blocks_of(C);
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
    const bool half = next ? next->config.kind == Kind::same && next->expand.half() : weights.head.half();
    space.out = make_map(arena, N, h, w, border, half);
    const ptrdiff_t flat_block = ptrdiff_t(positions) * BLOCK;
    space.project = offsets_of(b.project, flat_block);
    flat_floats = std::max(flat_floats, b.depthwise.places.size() * positions);
    grouped_blocks = std::max({grouped_blocks, b.project.blocks, b.squeeze.blocks});
    if (b.config.kind == Kind::same) {
      space.expand = offsets_of(b.expand, b.expand.half() ? in.half_block : in.block);
    } else if (b.config.kind == Kind::down) {
      space.middle = make_map(arena, N, h, w, true);
      space.squeeze = offsets_of(b.squeeze, flat_block);
      flat_floats = std::max(flat_floats, b.second.places.size() * positions);
    }
    if (b.config.kind != Kind::lite) {
      space.queries = arena.take(size_t(C) * MAX_TOKENS);
      space.keys = arena.take(size_t(N) * MAX_TOKENS);
      space.values = arena.take(size_t(blocks_of(N)) * M * BLOCK);
      slope_floats = std::max({slope_floats, 2 * b.depthwise.places.size(), 2 * b.second.places.size()});
    }
    for (Scratch& own : scratch) {
      const bool panels = b.config.kind == Kind::same;
      own.panel.push_back(panels ? arena.take(size_t(3) * (h + 2) * (w + 2) * BLOCK) : nullptr);
    }
    blocks.push_back(space);
    in = blocks.back().out;
    C = N;
    widest = std::max(widest, C);
    most_blocks = std::max(most_blocks, blocks_of(C));
  }
  flat.data = arena.take(flat_floats);
  flat.half = reinterpret_cast<uint16_t*>(flat.data);
  head = make_map(arena, 6 * C, h, w, false);
  head_offsets = offsets_of(weights.head, weights.head.half() ? in.half_block : in.block);
  gather_queries = arena.take(size_t(C) * MAX_TOKENS);
  image_half = (width / 2 + 2 + BLOCK) / BLOCK * BLOCK;
  in_order.resize(std::max({6 * C + D, config.hidden_features, 2 * D}));
  std::iota(in_order.begin(), in_order.end(), 0);

  const size_t rows = config.spatial_dynamic_relu ? M : 1;
  tokens = arena.take(size_t(M) * D);
  query_gate = arena.take(size_t(M) * 2 * most_blocks * BLOCK);
  key_value = arena.take(size_t(M) * 2 * most_blocks * BLOCK);
  gathered = arena.take(size_t(M) * std::max(widest, D));
  row = arena.take(size_t(M) * D);
  wide = arena.take(size_t(M) * 2 * D);
  reduced = arena.take(size_t(M) * blocks_of(D / 4) * 2 * BLOCK);
  for (float*& each : slopes) each = arena.take(rows * slope_floats);
  joint = arena.take(6 * C + D);
  if (config.spatial_dynamic_relu) {
    const size_t positions = size_t(stem.height) * stem.width;
    scores = arena.take(positions * BLOCK);
    mix = arena.take(positions * MAX_TOKENS);
  }
  for (Span& span : spans) {
    span.most = arena.take(2 * BLOCK);
    span.sums = arena.take(size_t(most_blocks) * M * BLOCK);
  }
  for (Scratch& own : scratch) {
    if (config.spatial_dynamic_relu && weights.head.half())
      own.plane = arena.take(size_t(stem.height) * stem.width * BLOCK);
    if (config.groups > 1) own.grouped = arena.take(size_t(grouped_blocks) * GROUPED_CHUNK * BLOCK);
    own.image_row = arena.take(width);
    own.image_rows = arena.take(size_t(config.in_chans) * 6 * image_half);
  }
}

}  // namespace mf::engine
