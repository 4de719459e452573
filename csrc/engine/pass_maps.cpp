// The convolutions of each kind of block.
#include <algorithm>
#include <cstring>

#include "engine/pass.h"

namespace mf::engine {
namespace {

constexpr size_t STRIP_BYTES =
    256 * 1024;  // of a depthwise output that stays in the second-level cache until it is read

double multiply_adds(const Pointwise& layer, int positions) { return double(layer.inputs) * layer.outputs * positions; }

double multiply_adds(const DepthwiseLayer& layer, int positions) {
  return 9.0 * std::count_if(layer.places.begin(), layer.places.end(), [](int place) { return place >= 0; }) *
         positions;
}

}  // namespace

void Pass::depthwise(const DepthwiseLayer& layer, const float* in, ptrdiff_t in_row, const Map& out, int block,
                     const float* slopes, Act act, const Pointwise& reader, int first_row, int last_row) {
  Depthwise d;
  d.in = in;
  d.in_row = in_row;
  d.stride = layer.stride;
  d.width = out.width;
  d.weight = layer.weight + ptrdiff_t(block) * 9 * BLOCK;
  d.bias = layer.bias + ptrdiff_t(block) * BLOCK;
  d.act = act;
  d.prefetch = member.prefetch.lines();
  if (act == Act::dynamic_relu && !spatial()) {
    d.slope1 = slopes + ptrdiff_t(block) * BLOCK;
    d.slope2 = d.slope1 + layer.places.size();
  }
  const ptrdiff_t plane = ptrdiff_t(out.positions()) * BLOCK;
  const Bfloat16Map bf16 = flat_bf16(reader, layer, out.positions());
  const int run = kernels.bf16_run, blocks = int(layer.in_block.size());
  if (bf16.data && block + 1 == blocks && blocks * BLOCK % run != 0) {
    // the rest of the last run, which weights of zero meet: it must be numbers
    uint16_t* rest = bf16.data + (bf16.part_size / bf16.run - 1) * bf16.run + BLOCK;
    for (int i = 0; i < bf16.parts; ++i, rest += bf16.part_size) {
      for (int p = first_row * out.width; p < last_row * out.width; ++p)
        std::fill_n(rest + p * run, BLOCK, uint16_t(0));
    }
  }
  if (act == Act::dynamic_relu && spatial()) {
    float* plain = bf16.data ? space.scratch[worker.rank].plane : space.flat + block * plane;
    d.act = Act::identity;
    d.out = plain;
    kernels.depthwise(d, first_row, last_row);
    float* begin = plain + ptrdiff_t(first_row) * out.width * BLOCK;
    spatial_relu(begin, ptrdiff_t(out.width) * BLOCK, out.width, first_row, last_row, slopes, int(layer.places.size()),
                 block);
    if (bf16.data) {
      Bfloat16Map rows = bf16;
      rows.data += ptrdiff_t(first_row) * out.width * run;
      kernels.to_bf16_map(begin, (last_row - first_row) * out.width, rows, block);
    }
    return;
  }
  d.bf16 = bf16;
  d.bf16_block = block;
  if (!bf16.data) d.out = space.flat + block * plane;
  kernels.depthwise(d, first_row, last_row);
}

// One block of channels, rows [first_row, last_row) of it beginning at x; slopes [M][2][places]
void Pass::spatial_relu(float* x, ptrdiff_t row, int width, int first_row, int last_row, const float* slopes,
                        int places, int block) {
  const int M = config.num_tokens;
  float both[2 * MAX_TOKENS * BLOCK];
  for (int line = 0; line < 2; ++line) {
    for (int m = 0; m < M; ++m) {
      std::copy_n(slopes + ptrdiff_t(2 * m + line) * places + block * BLOCK, BLOCK, both + (line * M + m) * BLOCK);
    }
  }
  kernels.spatial_relu(x, row, width, last_row - first_row, space.mix + ptrdiff_t(first_row) * width * MAX_TOKENS, both,
                       M);
}

// Depthwise, then pointwise: rows of the first stay in the cache until the second has read them
void Pass::depthwise_strips(const char* stage, const DepthwiseLayer& layer, const Map& in, const float* slopes, Act act,
                            const Pointwise& then, const Offsets& offsets, Map& out, const Map* residual,
                            bool also_bf16, const Images* images) {
  const int blocks = int(layer.in_block.size());
  const bool whole = extras.stages != nullptr;  // whoever looks inside wants all of the first
  const size_t row_bytes = layer.places.size() * out.width * (then.reads_bf16() ? 2 * then.parts() : 4);
  const int strip = whole ? out.height : std::max(1, int(STRIP_BYTES / row_bytes));
  int first, last, made = 0;
  worker.share(out.height, 1, &first, &last);
  for (int y = first; y < last; y += strip) {
    const int until = std::min(y + strip, last);
    if (images) {
      const int needed = std::min(in.height, (until - 1) * layer.stride + 2);
      stem(*images, made, needed);
      made = needed;
    }
    for (int b = 0; b < blocks; ++b) {
      depthwise(layer, in.data + layer.in_block[b] * in.block, in.row, out, b, slopes, act, then, y, until);
    }
    dump_flat(stage, layer, out.height, out.width, then);
    pointwise(then, layer, offsets, out, residual, also_bf16, y * out.width, until * out.width);
    if (images) mark(".expand, project");
  }
  worker.sync();
}

// Where nobody else needs them, rows of the first map are made just before they are read.
void Pass::lite(size_t i, const Images& images) {
  const Block& block = weights.blocks[i];
  const Map& in = before(i);
  Map& out = space.results[image_][i].out;
  const bool from_image = i == 0 && worker.size == 1;
  depthwise_strips(".expand", block.depthwise, in, nullptr, Act::relu6, block.project, space.blocks[i].project, out,
                   block.has_skip ? &in : nullptr, out.bf16.data != nullptr, from_image ? &images : nullptr);
  const int P = out.positions();
  mark(".expand, project", multiply_adds(block.depthwise, P) + multiply_adds(block.project, P));
}

void Pass::same(size_t i) {
  const Block& block = weights.blocks[i];
  BlockSpace& own = space.blocks[i];
  const Map& in = before(i);
  BlockResult& result = space.results[image_][i];
  if (spatial()) mix_tokens(in, own.height, own.width);
  const Pointwise& expand = block.expand;
  const void* from = expand.reads_bf16() ? static_cast<const void*>(in.bf16.data) : in.data;
  const int stride = expand.reads_bf16() ? kernels.bf16_run : BLOCK;
  const int places = int(block.depthwise.places.size());
  const float* slopes[] = {slopes_at(0, block.depthwise), slopes_at(1, block.depthwise)};
  float* panel = space.scratch[worker.rank].panel[i];
  const ptrdiff_t row = ptrdiff_t(own.width + 2) * BLOCK, plane = row * (own.height + 2);
  float* inside = panel + row + BLOCK;

  // A few blocks of the hidden map at a time: expanded, convolved, and never out of the cache
  const auto convolve = [&](const Window& window, int first_row, int last_row) {
    const ptrdiff_t group_block = ptrdiff_t(window.group) * expand.group_blocks;
    Products products = expand.groups[window.group].products;
    products.offsets = own.expand[window.group].data();
    products.part_size = in.bf16.part_size;
    Epilogue e;
    e.bias = expand.bias + group_block * BLOCK;
    e.width = own.width;
    e.out = inside - window.first_block * plane;  // where the group's first block would lie
    e.out_block = plane;
    e.out_row = row;
    if (!spatial()) {
      e.act = Act::dynamic_relu;
      e.slope1 = slopes[0] + group_block * BLOCK;
      e.slope2 = e.slope1 + places;
    }
    const int first_block = int(group_block) + window.first_block;
    const int above = std::max(0, first_row - 1), below = std::min(own.height, last_row + 1);  // rows that are read
    products.prefetch = member.prefetch.lines();
    kernels.pointwise(products, e, from, stride, above * own.width, below * own.width, window.first_panel,
                      window.last_panel);
    for (int b = 0; b < window.blocks; ++b) {
      float* x = inside + b * plane;
      if (spatial()) {
        spatial_relu(x + above * row, row, own.width, above, below, slopes[0], places, first_block + b);
      }
      dump_block(".expand", x, row, own.height, own.width, block.depthwise.places, first_block + b);
    }
    mark(".expand");
    for (int b = 0; b < window.blocks; ++b) {
      depthwise(block.depthwise, inside + b * plane, row, result.out, first_block + b, slopes[1], Act::dynamic_relu,
                block.project, first_row, last_row);
    }
    mark(".depthwise");
  };
  // Windows that do not come out even are dealt out by rows.
  const int windows = int(block.windows.size()), even = windows / worker.size * worker.size;
  int first, last;
  worker.share(even, 1, &first, &last);
  for (int w = first; w < last; ++w) convolve(block.windows[w], 0, own.height);
  worker.share(own.height, 1, &first, &last);
  for (int w = even; w < windows && first < last; ++w) convolve(block.windows[w], first, last);
  worker.sync();
  dump_flat(".depthwise", block.depthwise, own.height, own.width, block.project);
  // few positions are dealt out by outputs, many by positions
  const int P = result.out.positions();
  const bool by_panels = P < 128 && block.project.groups.size() == 1;
  int begin = 0, end = P;
  if (!by_panels) worker.share(end, 14, &begin, &end);
  pointwise(block.project, block.depthwise, own.project, result.out, block.has_skip ? &in : nullptr, false, begin, end,
            by_panels);
  worker.sync();
  mark(".project", multiply_adds(block.project, P));
  mark(".expand", multiply_adds(block.expand, P));
  mark(".depthwise", multiply_adds(block.depthwise, P));
  dump(".project", result.out);
  former_to_mobile(result);
}

void Pass::down(size_t i) {
  const Block& block = weights.blocks[i];
  BlockSpace& own = space.blocks[i];
  const Map& in = before(i);
  BlockResult& result = space.results[image_][i];
  if (spatial()) mix_tokens(in, own.height, own.width);
  depthwise_strips(".down", block.depthwise, in, slopes_at(0, block.depthwise), Act::dynamic_relu, block.squeeze,
                   own.squeeze, own.middle, nullptr, false);
  dump(".squeeze", own.middle);
  const int P = result.out.positions();
  mark(".down, squeeze", multiply_adds(block.depthwise, P) + multiply_adds(block.squeeze, P));
  depthwise_strips(".expand", block.second, own.middle, slopes_at(1, block.second), Act::dynamic_relu, block.project,
                   own.project, result.out, &own.middle, false);
  mark(".expand, project", multiply_adds(block.second, P) + multiply_adds(block.project, P));
  dump(".project", result.out);
  former_to_mobile(result);
}

}  // namespace mf::engine
